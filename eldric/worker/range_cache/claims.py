"""Which bytes of an entry are in use: each stage claims what it maps, and what nobody claims can be given back.

A claim is a file whose lock its process holds: that of a process that was killed counts no more. Claims are made and
looked at with the cache's lock held.
"""

import contextlib
import ctypes
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eldric.worker.range_cache.extents import Extent, Extents
from eldric.worker.range_cache.locks import FileLock

CLAIMS = "claims"
_MAX_BYTES = 1 << 24
#: fallocate(2): make a hole, keep the file's length.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


class Claim:
    """Extents, by file, that are in use until close."""

    def __init__(self, entry: Path, wanted: Mapping[int, Sequence[Extent]]) -> None:
        """Raises OSError."""
        (entry / CLAIMS).mkdir(exist_ok=True)
        self._path = entry / CLAIMS / uuid.uuid4().hex
        self._lock = FileLock(self._path)
        self._lock.own()
        document = {str(file): Extents(extents).as_lists() for file, extents in wanted.items()}
        try:
            self._path.write_text(json.dumps(document))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._lock.close()


def claimed(entry: Path, sizes: Sequence[int]) -> list[Extents]:
    """All that is in use, of each file. A claim that cannot be read is one to everything."""
    found: list[list[Extent]] = [[] for _ in sizes]
    for path in _living(entry):
        try:
            document = json.loads(path.read_bytes()[:_MAX_BYTES])
            for file, extents in document.items():
                found[int(file)] += Extents.from_lists(extents, sizes[int(file)])
        except (OSError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
            return [Extents([Extent(0, size)]) for size in sizes]
    return [Extents(extents) for extents in found]


def _living(entry: Path) -> Iterator[Path]:
    """Claims of processes that are there; those of others are removed."""
    try:
        paths = list((entry / CLAIMS).iterdir())
    except OSError:
        return
    for path in paths:
        try:
            with FileLock(path) as lock:
                if lock.try_own():
                    path.unlink()
                    continue
        except OSError:
            continue
        yield path


def punch(fd: int, extent: Extent) -> bool:
    """Make a hole, which takes no disk. False where that cannot be done."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    done: int = fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, extent.start, len(extent))
    return done == 0


def disk_bytes(fd: int) -> int:
    """What a file takes on the disk."""
    return os.fstat(fd).st_blocks * 512
