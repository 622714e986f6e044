"""Locks that workers of one machine share: flock(2) on files of the cache. The kernel drops those of a dead process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self


class FileLock:
    """One holder's grip on a lock file, which is made when it is not there. Held until close."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def share(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def own(self) -> None:
        """Waits for the others: only for what nobody holds for long."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def try_own(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Holds a lock while the block runs. Raises OSError."""
    with FileLock(path) as lock:
        lock.own()
        yield
