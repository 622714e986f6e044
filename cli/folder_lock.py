"""One command at a time starts or ends the nodes of a local cluster."""

import contextlib
import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from eldric.errors import DeadlineExceeded, InvalidRequest, PermissionDenied

#: Longest wait for another command, in seconds.
TIMEOUT_S = 90.0
_POLL_S = 0.02


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None], *, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process at the latest. Makes the folder.

    Raises DeadlineExceeded when another process has it for so long, InvalidRequest or PermissionDenied for what cannot
    be such a folder.
    """
    deadline = time.monotonic() + timeout_s
    waiting = False
    with _open(folder) as handle:
        while not _try(handle.fileno()):
            if not waiting:
                say(f"waiting for another command that starts or ends nodes in {folder}")
                waiting = True
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"another command has held {folder / 'lock'} for {timeout_s:g} s")
            time.sleep(_POLL_S)
        yield


def _open(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "lock", "ab")
    except OSError as error:
        forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise (PermissionDenied if forbidden else InvalidRequest)(
            f"{folder} cannot hold a cluster: {why}; name another folder with --dir"
        ) from error


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
