"""The header says how many tests of the real MNIST are left out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parents[1]


def test_header_counts_what_is_deselected():
    command = [sys.executable, "-m", "pytest", "tests/test_mnist.py", "--collect-only", "-n0", "-p", "no:cacheprovider"]
    environment = os.environ | {"MNIST_ARCHIVES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (announced,) = re.findall(r"^mnist: (\d+) tests deselected: ", result.stdout, re.MULTILINE)
    (deselected,) = re.findall(r"no tests collected \((\d+) deselected\)", result.stdout)
    assert int(announced) == int(deselected) > 0
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_folder_without_archives(tmp_path, monkeypatch):
    monkeypatch.setenv("MNIST_ARCHIVES", str(tmp_path))
    for name in conftest.ARCHIVES:
        with pytest.raises(pytest.UsageError, match=f"{re.escape(str(tmp_path))} lacks .*{name}"):
            conftest.pytest_configure()
        (tmp_path / name).touch()
    conftest.pytest_configure()
    assert re.fullmatch(rf"mnist: \d+ tests, archives in {re.escape(str(tmp_path))}", conftest.pytest_report_header())
