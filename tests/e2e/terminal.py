"""eldric-cli on a terminal: a pseudo-terminal for stdin, stdout and stderr."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.e2e.cli import Cli

#: Lines and columns.
SIZE = (40, 110)
_TIMEOUT_S = 30.0
#: Escape sequences that colour text: "Select Graphic Rendition" with a number from 30 on (ECMA-48).
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])(?:;\d+)*m")


@dataclass(slots=True)
class Terminal:
    """A command that thinks that a person is there."""

    handle: int
    process: "subprocess.Popen[str]"
    text: str = field(default="")

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def read_until(self, words: str) -> str:
        """Everything that came up to these words; then it is forgotten."""
        deadline = time.monotonic() + _TIMEOUT_S
        while words not in self.text:
            assert self._read(deadline), f"{words!r} did not come: {self.text!r}"
        end = self.text.index(words) + len(words)
        read, self.text = self.text[:end], self.text[end:]
        return read

    def read_to_end(self) -> str:
        """Everything that came."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self._read(deadline):
            pass
        self.process.wait(timeout=_TIMEOUT_S)
        return self.text

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.handle], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self.handle, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)


@contextlib.contextmanager
def on_terminal(cli: Cli, *arguments: object) -> Iterator[Terminal]:
    """Run a command on a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))

    def control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches who controls the terminal

    process = cli.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=control)
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
