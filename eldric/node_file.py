"""node.json: how a node's folder says that it runs, and where."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any, BinaryIO

from eldric import whole_files
from eldric.errors import AlreadyExists

NAME = "node.json"


class NodeFile:
    """node.json in a node's folder, and a lock that one process at a time can hold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: BinaryIO | None = None

    def lock(self) -> None:
        """Claims the folder until `remove` or the process's end. Raises AlreadyExists when another process has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = open(self._folder / "lock", "ab")  # noqa: SIM115 (stays open: the lock is the open file's)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            running = read(self._folder)
            pid = f" (process {running['pid']})" if running else ""
            raise AlreadyExists(f"a node{pid} runs in {self._folder} already") from None
        self._lock = handle

    def write(self, **fields: Any) -> None:
        """Atomically: a reader sees all of it or none."""
        whole_files.replace({self._folder / NAME: (json.dumps(fields) + "\n").encode()})

    def remove(self) -> None:
        """Removes node.json and gives the folder free. Does nothing without the lock."""
        if self._lock is None:
            return
        (self._folder / NAME).unlink(missing_ok=True)
        self._lock.close()
        self._lock = None


def read(folder: Path) -> dict[str, Any] | None:
    """The content of node.json; None when no node runs there, or it died without an orderly end and left nothing."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = json.loads((folder / NAME).read_text())
        if isinstance(content, dict):
            return content
    return None


def is_running(folder: Path) -> bool:
    """Whether a process holds the folder now; a node.json that a killed process left behind does not count."""
    try:
        with open(folder / "lock", "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
