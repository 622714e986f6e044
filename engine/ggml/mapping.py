"""Read-only mappings of a model's files: only the pages of a shard's byte ranges, brought in before they are needed.

A page that cannot be read kills the process with SIGBUS when it is touched. So pages come in by a system call, where a
failing disk or mount is an error that can be caught. Locked pages stay in, so that they are never read again.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import InvalidModel, ModelUnreadable
from eldric.engine.shard import ByteRange

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: read pages in, and map them
_COLD = 20  # MADV_COLD, Linux 5.4: what was used is to be evicted before what was read ahead and was not used yet
_PIECE_BYTES = 16 << 20  # so much comes in between two reports of progress

#: Called with (file, offset, length) before these bytes are mapped: brings them into the page cache, in its own way and
#: with its own deadline. May raise.
Fetch = Callable[[int, int, int], None]


class Mapping:
    """One mapped range of one file, widened to whole pages."""

    def __init__(self, path: Path, wanted: ByteRange, file_size: int) -> None:
        """Raises ModelUnreadable when the file cannot be opened or is shorter than its header said."""
        self.path, self.file = path, wanted.file
        self.offset = wanted.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self.end = min(-(-(wanted.offset + wanted.length) // mmap.PAGESIZE) * mmap.PAGESIZE, file_size)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ModelUnreadable(f"{path}: {error.strerror}") from error
        try:
            size = os.fstat(self._fd).st_size
            if size < file_size:
                raise ModelUnreadable(f"{path} shrank from {file_size} to {size} bytes")
            length = self.end - self.offset
            self._map = mmap.mmap(self._fd, length, access=mmap.ACCESS_READ, offset=self.offset)
        except OSError as error:
            os.close(self._fd)
            raise ModelUnreadable(f"{path} cannot be mapped: {error.strerror}") from error
        except BaseException:
            os.close(self._fd)
            raise
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        self.address: int = self._bytes.ctypes.data

    @property
    def nbytes(self) -> int:
        return self.end - self.offset

    def holds(self, file: int, offset: int, length: int) -> bool:
        return file == self.file and self.offset <= offset and offset + length <= self.end

    def read_in(self, offset: int, length: int) -> None:
        """Bring the pages of file bytes [offset, offset + length) in. Raises ModelUnreadable."""
        start = (offset - self.offset) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = offset - self.offset + length
        try:
            if sys.platform == "linux":
                failed = _call("madvise", self.address + start, stop - start, _POPULATE_READ)
                if not failed:
                    return
                if failed != errno.EINVAL:  # EINVAL: an older kernel
                    raise OSError(failed, os.strerror(failed))
            self._read(self.offset + start, stop - start)
        except OSError as error:
            reason = "storage failed, or the file was cut" if error.errno == errno.EFAULT else error.strerror
            raise ModelUnreadable(f"{self.path} at byte {offset}: {reason}") from error

    def lock(self, offset: int, length: int) -> bool:
        """Keep the pages of file bytes [offset, offset + length), which are in, from being evicted.

        Returns False where the system, or the process's limit, does not allow it.
        """
        start = (offset - self.offset) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = offset - self.offset + length
        return sys.platform == "linux" and not _call("mlock", self.address + start, stop - start)

    def drop(self, offset: int, length: int) -> None:
        """Take the whole pages within file bytes [offset, offset + length) out of the process. They can come again."""
        start = -(-(offset - self.offset) // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (offset - self.offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            if sys.platform == "linux":
                _call("madvise", self.address + start, stop - start, _COLD)
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes = None  # the map cannot be closed while it is viewed
            self._map.close()
            os.close(self._fd)

    def _read(self, offset: int, length: int) -> None:
        """Read bytes into the page cache, where the kernel cannot map them on demand without a fault."""
        scratch = bytearray(min(length, 1 << 20))
        os.lseek(self._fd, offset, os.SEEK_SET)
        while length > 0:
            with memoryview(scratch)[: min(length, len(scratch))] as piece:
                count = os.readv(self._fd, [piece]) if hasattr(os, "readv") else len(os.read(self._fd, len(piece)))
            if count == 0:
                return  # the last page, beyond the end of the file
            length -= count


class Mappings:
    """All mappings of a shard."""

    def __init__(self, paths: tuple[Path, ...], sizes: tuple[int, ...], ranges: Iterable[ByteRange]) -> None:
        """ranges are sorted by file and offset; those that share or touch a page become one mapping."""
        self._all: list[Mapping] = []
        try:
            for wanted in _by_pages(ranges):
                self._all.append(Mapping(paths[wanted.file], wanted, sizes[wanted.file]))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterable[Mapping]:
        return iter(self._all)

    def of(self, file: int, offset: int, length: int) -> Mapping:
        for mapping in self._all:
            if mapping.holds(file, offset, length):
                return mapping
        raise InvalidModel("a tensor lies outside of its shard's ranges", offset=offset)

    def close(self) -> None:
        for mapping in self._all:
            mapping.close()
        self._all.clear()


def read_in(
    mapping: Mapping, offset: int, length: int, on_piece: Callable[[int], None], fetch: Fetch | None = None
) -> None:
    """Bring a range in piece by piece. on_piece gets each piece's bytes, and may raise to stop."""
    for start in range(offset, offset + length, _PIECE_BYTES):
        piece = min(_PIECE_BYTES, offset + length - start)
        if fetch is not None:
            fetch(mapping.file, start, piece)
        mapping.read_in(start, piece)
        on_piece(piece)


def _call(name: str, address: int, *values: int) -> int:
    """A system call on pages; 0 or errno. Other threads run meanwhile: Python's own madvise would hold them up."""
    done = getattr(_LIBC, name)(ctypes.c_void_p(address), *map(ctypes.c_size_t, values))
    return ctypes.get_errno() if done else 0


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _by_pages(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    merged: list[ByteRange] = []
    for wanted in ranges:
        last = merged[-1] if merged else None
        if last and last.file == wanted.file and _page(wanted.offset) <= _page(last.offset + last.length - 1) + 1:
            merged[-1] = ByteRange(last.file, last.offset, wanted.offset + wanted.length - last.offset)
        else:
            merged.append(wanted)
    return merged


def _page(offset: int) -> int:
    return offset // mmap.ALLOCATIONGRANULARITY
