"""Checksums of files that nobody imported: kept beside the store from one check to the next."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

_MAX_BYTES = 1 << 24


class _Sum(NamedTuple):
    size_bytes: int
    modified_ns: int
    sha256: str


class Sums:
    """SHA-256 by file name, each good for one size and time of change. Thread-safe.

    Where the store cannot be written they are kept in memory only. Two processes that write at once lose one
    of the sums: it is computed again when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sums = _load(path)

    def get(self, name: str, status: os.stat_result) -> str:
        """The sum of a file as it is now; empty when there is none."""
        known = self._sums.get(name)
        return known.sha256 if known and known[:2] == (status.st_size, status.st_mtime_ns) else ""

    def put(self, name: str, status: os.stat_result, sha256: str) -> None:
        with self._lock:
            self._sums[name] = _Sum(status.st_size, status.st_mtime_ns, sha256)
            self._save()

    def drop(self, name: str) -> None:
        with self._lock:
            if self._sums.pop(name, None):
                self._save()

    def _save(self) -> None:
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            draft.write_text(json.dumps(self._sums, indent=1))
            draft.replace(self._path)


def _load(path: Path) -> dict[str, _Sum]:
    """The kept sums; none where the file is missing or was not written by this program."""
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
        sums = {str(name): _Sum(*entry) for name, entry in document.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    kinds = (int, int, str)
    return {name: known for name, known in sums.items() if tuple(map(type, known)) == kinds}
