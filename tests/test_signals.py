"""Signals end a command in one line, and wait where state is kept first."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from experiments import signals


@pytest.fixture(autouse=True)
def clean():
    before, hook = {number: signal.getsignal(number) for number in signals.ENDING}, sys.unraisablehook
    yield
    signals._received.clear()
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def deferring(body):
    with signals.deferred() as asked:
        body(asked)


def test_deferred_signal_comes_at_the_end():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))

    def body(asked):
        assert not asked()
        for _ in range(2):  # some senders address the process and its group
            signal.raise_signal(signal.SIGTERM)
            assert asked()
            assert not seen

    with pytest.raises(signals.Stopped):  # as its handler raises nothing
        deferring(body)
    assert seen == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        deferring(lambda asked: signal.raise_signal(signal.SIGINT))
    deferring(lambda asked: asked() and pytest.fail("it comes twice"))


def test_signal_in_a_callback_of_the_garbage_collector_is_not_lost():
    """Python drops what is raised there, and prints it."""
    signals.raise_stopped("program")
    sent = []

    def callback(phase, info):
        if phase == "start" and not sent:
            sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    try:
        gc.collect()
        with pytest.raises(signals.Stopped):
            time.sleep(5.0)
    finally:
        gc.callbacks.remove(callback)
    assert signals.received() == signal.SIGTERM


def test_later_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(signals, "REPEAT", 0.0)

    def body(asked):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waits")

    with pytest.raises(signals.Stopped):
        deferring(body)


def test_error_in_the_block_goes_first():
    def body(asked):
        signal.raise_signal(signal.SIGINT)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        deferring(body)


def test_signal_whose_exception_was_lost():
    signals.raise_stopped("program")
    with pytest.raises(signals.Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert signals.received() == signal.SIGTERM
    signal.raise_signal(signal.SIGTERM)  # at once: the same once more
    with pytest.raises(signals.Stopped):
        deferring(lambda asked: pytest.fail("it goes on"))


def test_ignored_signals_stay_ignored():
    """As those of nohup and of a shell's background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.raise_stopped("program")
    with signals.deferred() as asked:
        signal.raise_signal(signal.SIGINT)
        assert not asked()


@pytest.mark.parametrize("number", signals.ENDING)
def test_one_line_while_modules_are_imported(number):
    command = [sys.executable, "-X", "importtime", "-m", "experiments.sigma_sweep"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.endswith("| jax._src.config\n") or line.endswith(" typing_extensions\n"):
                os.kill(process.pid, number)
                break
        *imports, last = process.stderr.read().splitlines()
    assert process.returncode == 128 + number
    assert last == signals.message("sigma_sweep", number)
    assert all(line.startswith("import time:") for line in imports)


def test_importing_the_package_changes_no_handler():
    code = "import signal, experiments; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert printed == f"{signal.default_int_handler} {signal.SIG_DFL}\n"
