"""Signals that end a command: they run its clean-up, and wait where it must not be torn apart."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: Exit code of a command that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP become SystemExit, as SIGINT becomes KeyboardInterrupt: `finally` blocks run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # what was told to ignore a hang-up goes on ignoring it
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """An ending signal that comes in the block takes effect after it. Elsewhere than in the main thread, no change."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {number: signal.signal(number, lambda *signalled: came.append(signalled)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for came_number, frame in came:
        handler = before[signal.Signals(came_number)]
        if callable(handler):
            handler(came_number, frame)
