"""What all tests share: strict ranks, and which tests need a download.

Only scalars broadcast without being told to: an accidental [B] against [B, B] is an error, not a wrong number.
"""

import ast
import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ARCHIVES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def mnist_archives():
    """The folder with MNIST's four archives, or None if $MNIST_ARCHIVES is not set."""
    return os.environ.get("MNIST_ARCHIVES") or None


def pytest_configure():
    folder = mnist_archives()
    missing = [name for name in ARCHIVES if folder and not Path(folder, name).is_file()]
    if missing:
        raise pytest.UsageError(f"MNIST_ARCHIVES={folder} lacks {', '.join(missing)}: give the folder, or unset it")


def pytest_report_header():
    # Under xdist nobody counts what the workers deselect; in that file, a function is one test.
    tree = ast.parse(Path(__file__).with_name("test_mnist.py").read_text())
    count = sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
    if mnist_archives():
        return f"mnist: {count} tests, archives in {mnist_archives()}"
    return (
        f"mnist: {count} tests deselected: set $MNIST_ARCHIVES to a folder with the four archives of MNIST "
        f"({', '.join(ARCHIVES)})"
    )


def pytest_collection_modifyitems(config, items):
    if mnist_archives():
        return
    deselected = [item for item in items if item.get_closest_marker("mnist")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
