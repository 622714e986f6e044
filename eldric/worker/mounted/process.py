"""The other end of child.py: a process whose every answer has a deadline, and which is left alone when it hangs."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eldric.engine.errors import LoadCancelled

_SCRIPT = Path(__file__).with_name("child.py")
_POLL_S = 0.2  # how often somebody who waits looks whether the wait was cancelled
_START_S = 20.0  # how long a process may take to be there, on a machine that is very busy
_END_S = 0.5  # how long a killed process may take to end before it is left to end by itself
_MAX_LINE = 1 << 20

_left: list["subprocess.Popen[bytes]"] = []  # killed, but still stuck in a call of the kernel's


def look(files: Sequence[tuple[Path, int]], timeout_s: float) -> None:
    """Bring files' headers (of so many bytes each) into the page cache. Raises Silent, OSError."""
    child = Child("look", {"files": [(str(path), header_bytes) for path, header_bytes in files]})
    try:
        child.line(timeout_s)
    finally:
        child.close()


class Silent(Exception):
    """No answer in time."""


class Child:
    """One process of child.py. One thread at a time may use it; `close` kills it."""

    def __init__(self, mode: str, request: dict[str, Any]) -> None:
        """Raises OSError when no process can be started."""
        _left[:] = [process for process in _left if process.poll() is None]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._rest, self._greeted = b"", False
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        self.say(json.dumps(request))

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def say(self, line: str) -> None:
        """Write a line. A child that is gone is noticed by whoever waits for its answer."""
        data = line.encode(errors="surrogateescape") + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._input, data) :]

    def line(self, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> str:
        """The next answer; the time that the process takes to be there does not count.

        Raises Silent, LoadCancelled when `cancelled` says so, OSError for a failure.
        """
        self.greet(cancelled)
        return self._line(timeout_s, cancelled)

    def greet(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until the process is there. Raises as `line` does."""
        if not self._greeted:
            self._line(_START_S, cancelled)
            self._greeted = True

    def _line(self, timeout_s: float, cancelled: Callable[[], bool]) -> str:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if cancelled():
                raise LoadCancelled("the load was cancelled")
            if left <= 0 or len(self._rest) > _MAX_LINE:
                raise Silent
            if self._poll.poll(1000 * min(left, _POLL_S)):
                data = os.read(self._output, 1 << 16)
                if not data:
                    raise OSError(0, "the process that reads the mount has ended")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer = line.decode()
        if answer.startswith('{"errno"'):
            failure = json.loads(answer)
            raise OSError(failure["errno"], failure["message"])
        return answer

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            _left.append(self._process)
