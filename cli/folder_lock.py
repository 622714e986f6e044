"""One command at a time starts or ends the nodes of a local cluster."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from eldric.errors import DeadlineExceeded

#: Longest wait for another command, in seconds.
TIMEOUT_S = 90.0
_POLL_S = 0.02


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None], *, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process at the latest. Makes the folder.

    Raises DeadlineExceeded when another process has it for so long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    waiting = False
    with open(folder / "lock", "ab") as handle:
        while not _try(handle.fileno()):
            if not waiting:
                say(f"waiting for another command that starts or ends nodes in {folder}")
                waiting = True
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"another command has held {folder / 'lock'} for {timeout_s:g} s")
            time.sleep(_POLL_S)
        yield


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
