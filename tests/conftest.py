"""What all tests share: strict ranks, runs that several files read, and which tests wait for archives.

Only scalars broadcast without being told to: an accidental [B] against [B, B] is an error, not a wrong number.
"""

import ast
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation takes most of a test's time: the tests compile a thousand programs, and run each for milliseconds. So XLA
# leaves out most optimisations, and a cache on disk serves a worker and the processes that its tests start. Workers do
# not share it: JAX does not write its files atomically. JAX_DISABLE_MOST_OPTIMIZATIONS=false tests what users run.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "true"),
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
os.environ |= QUICK
jax.config.update("jax_disable_most_optimizations", QUICK["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true")
jax.config.update("jax_compilation_cache_dir", QUICK["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

ROOT = Path(__file__).parents[1]
ARCHIVES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def mnist_archives():
    """The folder with MNIST's four archives, or None if $MNIST_ARCHIVES is not set."""
    return os.environ.get("MNIST_ARCHIVES") or None


def pytest_configure():
    folder = mnist_archives()
    missing = [name for name in ARCHIVES if folder and not Path(folder, name).is_file()]
    if missing:
        raise pytest.UsageError(f"MNIST_ARCHIVES={folder} lacks {', '.join(missing)}: give the folder, or unset it")


def pytest_unconfigure():
    shutil.rmtree(QUICK["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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


@pytest.fixture(params=[np.float32, np.float64])
def accuracy(request):
    """The relative accuracy of Bessel functions in this precision, from which all tolerances of Theorem 1 follow."""
    with jax.enable_x64(request.param == np.float64):
        yield {np.float32: 1e-5, np.float64: 1e-10}[request.param]


@pytest.fixture(scope="module")
def plain_sweep():
    """A sweep's figures and the limits of the toy take longer than the training of a small one."""
    from experiments import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *arguments, **options: None)
        patch.setattr(report, "with_limits", lambda row, test_log_prob, **limits: row)
        yield


def filled(kind, /, **given):
    """A result of this kind with the `given` fields, and with zeros and empty values in all others that it needs."""
    empty = {str: "", float: 0.0, int: 0, bool: False, int | None: None, str | None: None}
    types = typing.get_type_hints(kind)
    fields, none = dataclasses.fields(kind), dataclasses.MISSING
    needed = [field.name for field in fields if field.default is none and field.default_factory is none]
    return kind(**{name: empty.get(types[name], []) for name in needed} | given)


def call(module, words):
    """Does in this process what the command of an experiment's module does with these words, and forgets its flags."""
    with flagsaver.flagsaver():
        module.define_flags()
        flags.FLAGS([module.__name__, *words])
        module.main()


@contextlib.contextmanager
def interruption(*, group, after):
    """Ctrl-C when training is about to write metrics of this group of a step beyond `after`, which must come."""
    from lvae_jax import runs

    append = runs.append_metrics

    def interrupted(run_dir, lines):
        if lines[0]["group"] == group and lines[0]["step"] > after:
            raise KeyboardInterrupt
        append(run_dir, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "append_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def run_command(module, *words):
    """The finished process of a command, `python -m module words`."""
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


class Run(NamedTuple):
    """A finished run of a command, to be read and never to be changed: its directory, its flags, what it printed."""

    path: Path
    flags: tuple[str, ...]
    stdout: str
    stderr: str


def once(tmp_path_factory, name, make):
    """The folder `name` that `make(folder)` has filled, once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    done, failed = folder / "done", folder / "failed"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 1200.0
        while not done.exists():
            assert not failed.exists(), f"{name}: the other worker that makes it has failed"
            assert time.monotonic() < deadline, f"{name}: the other worker that makes it has gone"
            time.sleep(0.1)
        return folder
    try:
        make(folder)
        done.touch()
    except BaseException:
        failed.touch()
        raise
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A finished run of the sweep's command, of every variant on the toy."""
    words = ("--sigma=1,0.1", "--variants=f,ls,lv,optimal,f_star,replay,geometric,kl_warmup", "--num_seeds=2")
    words += ("--seed=3", "--num_steps=40", "--batch_size=20", "--widths=32", "--num_blocks=1", "--ema_decay=0.9")

    def make(folder):
        result = run_command("experiments.sigma_sweep", *words, f"--run_dir={folder / 'run'}")
        assert result.returncode == 0, result.stderr
        for name in ("stdout", "stderr"):
            (folder / name).write_text(getattr(result, name))

    folder = once(tmp_path_factory, "toy_run", make)
    return Run(folder / "run", words, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def arrays_in(file):
    """The arrays in a .npz file, by name. The file is closed: one left open is a warning, and so a failure, of the test
    that runs when it is collected."""
    with np.load(file) as arrays:
        return dict(arrays)
