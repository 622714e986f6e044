"""The memory that a link's payloads travel in: an anonymous file (memfd) that both ends map.

It has no name to find, and nothing of it is left once both ends are gone, however they went.
"""

import fcntl
import mmap
import os
from collections import deque

from eldric.transport.base import TransportOptions
from eldric.transport.errors import CorruptFrame

#: The file can neither shrink nor grow any more, so that no end can take mapped pages away from the other.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ALIGNMENT = 64  # a cache line
#: Memory that an idle link keeps.
_KEPT_BYTES = 16 * 1024 * 1024


def memory_bytes(options: TransportOptions) -> int:
    """Room for all that may be under way, and for gaps between the pieces. Pages are taken when first written to."""
    payload = options.max_payload_bytes + _ALIGNMENT
    size = options.queue_bytes + options.queue_frames * _ALIGNMENT + 3 * payload
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Space:
    """Which part of the memory is in use. Pure.

    Each piece takes the first gap that it fits in, so that few pages are touched. Pieces are given back in the order in
    which they were reserved.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pieces: deque[tuple[int, int]] = deque()  # start and end, oldest first
        self._by_place: list[tuple[int, int]] = []  # the same, lowest first
        self._given_back = 0
        self.touched = 0  # bytes from the memory's beginning that were reserved since this was set to 0

    def reserve(self, size: int) -> int | None:
        """Where a piece begins; None when there is no room."""
        start, place = 0, len(self._by_place)
        needed = -(-size // _ALIGNMENT) * _ALIGNMENT or _ALIGNMENT
        for index, (other_start, other_end) in enumerate(self._by_place):
            if start + needed <= other_start:
                place = index
                break
            start = other_end
        end = start + needed
        if end > self._size:
            return None
        piece = (start, end)
        self._pieces.append(piece)
        self._by_place.insert(place, piece)
        if end > self.touched:
            self.touched = end
        return start

    def take_back(self) -> None:
        """The last reservation was for nothing."""
        self._by_place.remove(self._pieces.pop())

    def give_back(self, count: int) -> None:
        """The first `count` pieces, counted since the beginning, are free."""
        while self._given_back < count and self._pieces:
            self._by_place.remove(self._pieces.popleft())
            self._given_back += 1

    @property
    def is_empty(self) -> bool:
        return not self._pieces


class SenderMemory:
    """The sender's end, which makes the file."""

    def __init__(self, options: TransportOptions) -> None:
        size = memory_bytes(options)
        self.descriptor = os.memfd_create("eldric-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.space = Space(size)

    def put(self, payload: memoryview) -> int | None:
        """Copy a payload in; gives where. None when there is no room."""
        start = self.space.reserve(payload.nbytes)
        if start is not None and payload.nbytes:
            self._map[start : start + payload.nbytes] = payload
        return start

    def give_back(self, count: int) -> None:
        """As Space.give_back; returns pages to the system after a time of large payloads."""
        space = self.space
        space.give_back(count)
        if space.touched > _KEPT_BYTES and space.is_empty:
            self._map.madvise(mmap.MADV_REMOVE, _KEPT_BYTES, self._page_end(space.touched) - _KEPT_BYTES)
            space.touched = 0

    def close(self) -> None:
        self._map.close()
        os.close(self.descriptor)

    def _page_end(self, position: int) -> int:
        return min(len(self._map), -(-position // mmap.PAGESIZE) * mmap.PAGESIZE)


class ReceiverMemory:
    """The receiver's end: what the sender's file holds can only be read."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over. Raises CorruptFrame when it is not such a file."""
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS:
                raise CorruptFrame("the link's memory is not sealed")
            self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise CorruptFrame(f"the link's memory cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        self._size = len(self._map)

    def get(self, start: int, size: int) -> bytes | None:
        """A copy; None when it is not within the file."""
        return self._map[start : start + size] if start + size <= self._size else None

    def close(self) -> None:
        self._map.close()
