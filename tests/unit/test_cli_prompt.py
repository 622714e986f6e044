"""A signal that comes while a command waits for a person is heard, whenever it comes."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from eldric.cli import interrupts

_TIMEOUT_S = 20.0

#: The signal comes after the prompt was written and before readline waits: raised by a C function that C calls, so that
#: no line of Python, which would look at it, lies between.
_ASK = """
import ctypes, functools, sys, readline
from eldric.cli import interrupts, text
readline.set_pre_input_hook(functools.partial(getattr(ctypes.CDLL(None), "raise"), int(sys.argv[1])))
try:
    with interrupts.as_exceptions():
        next(text._lines())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_the_prompt_and_the_wait_for_a_key_is_heard(number: int, code: int) -> None:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _ASK, str(int(number))], stdin=theirs, stdout=theirs, stderr=theirs
        )
        try:
            assert process.wait(_TIMEOUT_S) == code
        finally:
            process.kill()
            process.wait()
        seen = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "> " in seen
    assert "Traceback" not in seen


def open_files() -> set[tuple[str, str]]:
    """Descriptors and what they are. What tests before this one left open may be closed at any time."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found


@pytest.fixture
def untouched() -> Iterator[None]:
    """Nothing of it is left behind: no handler, no descriptor for wake-ups, no thread, no file."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)}
    files = open_files()
    yield
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert "nudge" not in {thread.name for thread in threading.enumerate()}
    assert not open_files() - files


def test_a_block_without_a_signal_leaves_nothing_behind(untouched: None) -> None:
    for _ in range(100):
        with interrupts.heard():
            pass


def test_a_block_with_a_signal_leaves_nothing_behind(untouched: None) -> None:
    for _ in range(100):
        with pytest.raises(KeyboardInterrupt), interrupts.heard():
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)


def type_line(keyboard: int) -> None:
    os.write(keyboard, b"a line\n")
    os.close(keyboard)


def test_a_signal_that_ends_nothing_leaves_the_line_whole(untouched: None) -> None:
    reader, writer = os.pipe()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with os.fdopen(reader) as lines, interrupts.heard():
            signal.raise_signal(signal.SIGUSR1)
            threading.Timer(0.2, type_line, [writer]).start()
            assert lines.readline() == "a line\n"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_may_ask_too(untouched: None) -> None:
    asked = []

    def ask() -> None:
        with interrupts.heard():
            asked.append(signal.getsignal(signal.SIGURG))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert asked == [signal.SIG_DFL]
