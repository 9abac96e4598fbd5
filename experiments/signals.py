"""The signals that end a command, SIGINT (Ctrl-C) and SIGTERM (clusters, Colab): one line, after a checkpoint.

This module imports nothing that is slow: `experiments/__init__.py` calls it before all that is.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
REPEAT = 1.0  # seconds in which a signal may come twice: some senders address the process and its group
MOMENT = 0.05  # seconds after which Python's callbacks, which are short, have ended

_received: list[tuple[int, float]] = []  # numbers and times of the signals so far


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""


def message(name: str, number: int) -> str:
    """The line in which the command `name` says that the signal `number` has ended it."""
    return (
        f"{name}: stopped by {signal.Signals(number).name}; the same command goes on from its last checkpoint, or "
        "starts again without one"
    )


def exit_at_once(name: str) -> None:
    """From now on, a signal ends the process with one line and the status that shells give: while modules are imported
    an exception could be caught or lost."""
    _handle(lambda number, frame: _exit(name, number))


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """After this block, signals do what they did before it."""
    before, hook = {number: signal.getsignal(number) for number in ENDING}, sys.unraisablehook
    try:
        yield
    finally:
        _received.clear()
        sys.unraisablehook = hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def raise_stopped(name: str) -> None:
    """From now on, a signal raises `Stopped`, and another one, later, ends the process at once. One that comes where
    Python drops exceptions comes again, a moment later."""

    def handler(number: int, frame: Any) -> None:
        first = not _received
        if _is_late(number):
            _exit(name, number)
        if first:
            raise Stopped

    hook = sys.unraisablehook

    def unraisable(lost: Any) -> None:
        # Python drops what is raised in a callback of its own, such as one of the garbage collector.
        if isinstance(lost.exc_value, Stopped) and _received:
            number = _received[0][0]
            _received.clear()
            threading.Timer(MOMENT, os.kill, (os.getpid(), number)).start()
        else:
            hook(lost)

    _handle(handler)
    sys.unraisablehook = unraisable


def received() -> int | None:
    """The number of the first signal since `raise_stopped`; None without one."""
    return _received[0][0] if _received else None


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """In this block, a signal makes the function that it gives return True, and takes its effect at the end of the
    block; another one, later, raises `Stopped`. Threads other than the main one get no signals.

    Raises:
      Stopped: a signal came before, and what it raised was lost.
    """
    if _received:
        raise Stopped
    here: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if _is_late(number):
            raise Stopped
        here.append(number)

    before = _handle(handler)
    try:
        yield lambda: bool(here)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        if here:
            _received.clear()  # it comes now
    if here:
        signal.raise_signal(here[0])
        raise Stopped  # whatever the program does with its signals, what the block did is not finished


def _is_late(number: int) -> bool:
    """Tells whether another signal came more than a moment before, and notes this one."""
    _received.append((number, time.monotonic()))
    return _received[-1][1] - _received[0][1] > REPEAT


def _exit(name: str, number: int) -> None:
    os.write(2, f"{message(name, number)}\n".encode())
    os._exit(128 + number)


def _handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Makes `handler` that of the signals, but for those that the process was started to ignore; returns those of
    before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


def exit_while_importing() -> None:
    """`exit_at_once`, if Python is about to run one of these commands by `python -m`."""
    programs = [word for word in sys.orig_argv if word.startswith("experiments.")]
    if sys.argv[:1] == ["-m"] and programs:  # which argv[0] is until the module has been found
        exit_at_once(programs[0].rpartition(".")[2])
