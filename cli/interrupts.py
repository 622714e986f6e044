"""Signals that end a command: they run its clean-up, and wait where it must not be torn apart."""

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: Exit code of a command that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Breaks a wait in C, and does nothing where nobody handles it.
_NUDGE = signal.SIGURG
#: Between two nudges, in seconds.
_NUDGE_S = 0.02


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


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """A signal in the block is heard although the main thread waits for input. Elsewhere, no change.

    Readline, and read(2) too, waits until a key or a signal comes. A signal that came just before it began to wait
    has left a mark that Python looks at after the next key only. So a thread, which the signal's own write wakes, goes
    on breaking that wait until the block is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, left = threading.get_ident(), threading.Event()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # as signal.set_wakeup_fd wants it

    def nudge() -> None:
        with ours:
            if ours.recv(1):
                while not left.wait(_NUDGE_S):
                    signal.pthread_kill(main, _NUDGE)

    thread = threading.Thread(target=nudge, name="nudge", daemon=True)
    before = signal.getsignal(_NUDGE)
    try:
        signal.signal(_NUDGE, lambda number, frame: None)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread.start()
        yield
    finally:
        with deferred():  # a second Ctrl-C leaves no half of this behind
            left.set()
            signal.set_wakeup_fd(-1)
            theirs.close()  # ends a thread that no signal has woken
            if thread.is_alive():
                thread.join()
            signal.signal(_NUDGE, before)
