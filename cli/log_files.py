"""Reading the log files of nodes."""

from collections import deque
from pathlib import Path


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file; none when there is no file."""
    try:
        with open(path, errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=count)]
    except FileNotFoundError:
        return []


class Follower:
    """What is written to a file from now on. A file that begins anew is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._read = self._look()

    def new_lines(self) -> list[str]:
        """Whole lines that have come since the last call."""
        inode, size = self._look()
        if inode != self._inode or size < self._read:
            self._inode, self._read = inode, 0
        if size == self._read:
            return []
        with open(self._path, "rb") as file:
            file.seek(self._read)
            text = file.read(size - self._read)
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _look(self) -> tuple[int, int]:
        """The file's number and size; zeros when there is none."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size
