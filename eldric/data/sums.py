"""Checksums of files that nobody imported: kept beside the store from one check to the next."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

from eldric.data.checksums import FileSums, blocks_of

_MAX_BYTES = 1 << 26


class _Sum(NamedTuple):
    size_bytes: int
    modified_ns: int
    sha256: str
    blocks: list[str]


class Sums:
    """Sums by file name, each good for one size and time of change. Thread-safe.

    Where the store cannot be written they are kept in memory only. Two processes that write at once lose one
    of the sums: it is computed again when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sums = _load(path)

    def get(self, name: str, status: os.stat_result) -> FileSums:
        """The sums of a file as it is now; empty when there are none."""
        known = self._sums.get(name)
        if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
            return FileSums()
        return FileSums(known.sha256, tuple(known.blocks))

    def put(self, name: str, status: os.stat_result, sums: FileSums) -> None:
        with self._lock:
            self._sums[name] = _Sum(status.st_size, status.st_mtime_ns, sums.sha256, list(sums.blocks))
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
    return {name: known for name, known in sums.items() if _is_sound(known)}


def _is_sound(known: _Sum) -> bool:
    if tuple(map(type, known)) != (int, int, str, list):
        return False
    return len(known.blocks) == blocks_of(known.size_bytes) and all(isinstance(block, str) for block in known.blocks)
