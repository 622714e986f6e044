"""Skips GGUF string arrays fast: hundreds of thousands of strings without a Python object for each.

A string is a little-endian u64 length and that many bytes, so strings form a chain: each length says where
the next one lies. Almost every length is below 256, which is a byte followed by seven zeros. numpy finds all
places that look so, and the stretches in which each place is exactly where the one before points. A stretch
that begins at a string of the chain is therefore the chain. Where it breaks (a long string, zeros inside a
string) a plain loop carries on.
"""

import mmap
import struct

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | mmap.mmap
LENGTH = struct.Struct("<Q")
_FIRST_WINDOW, _LAST_WINDOW = (
    4096,
    1 << 18,
)  # bytes searched at once: few at first, not to read far past the end
_PLAIN_STEPS = 64  # strings walked one by one after a break, so that many breaks cost no more than a plain loop


class BrokenString(Exception):
    """A string reaches past the end. offset: of its length field."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__(offset)


def skip_string(buffer: Buffer, offset: int, end: int) -> int:
    """Return the offset after the string at `offset`. Raises BrokenString if it reaches past `end`."""
    if offset + 8 > end:
        raise BrokenString(offset)
    after: int = offset + 8 + LENGTH.unpack_from(buffer, offset)[0]
    if after > end:
        raise BrokenString(offset)
    return after


def skip_strings(buffer: Buffer, offset: int, count: int, end: int) -> int:
    """Return the offset after the `count` strings at `offset`. Raises BrokenString if one reaches past `end`."""
    size = _FIRST_WINDOW
    while count:
        window = _Window(buffer, offset, min(offset + size, end))
        size = min(2 * size, _LAST_WINDOW)
        while True:
            place, known = window.walk(offset, count)
            if known:
                count -= known
                offset = skip_string(buffer, place, end)
            for _ in range(min(count, _PLAIN_STEPS)):
                count -= 1
                offset = skip_string(buffer, offset, end)
                if offset >= window.stop:
                    break
            if not count or offset >= window.stop:
                break
    return offset


class _Window:
    """The places in [start, stop) that look like lengths below 256.

    Works on a copy: a mapping cannot be closed while an exception's frames hold a view of it.
    """

    __slots__ = ("_breaks", "_places", "start", "stop")

    def __init__(self, buffer: Buffer, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        octets = np.frombuffer(buffer[start:stop], np.uint8)
        zeros = octets == 0
        zeros = zeros[:-1] & zeros[1:]
        zeros = zeros[:-2] & zeros[2:]
        zeros = zeros[:-3] & zeros[3:]  # zeros[i]: octets i to i + 6
        self._places: NDArray[np.intp] = np.flatnonzero(zeros[1:])
        ends = self._places + octets[self._places] + 8
        # Indices of places whose string does not end at the next place; the last place is always one.
        self._breaks = np.append(np.flatnonzero(ends[:-1] != self._places[1:]), len(self._places) - 1)

    def walk(self, offset: int, count: int) -> tuple[int, int]:
        """From the string at `offset` on, follow at most `count` strings: offset of the last, and how many."""
        first = int(np.searchsorted(self._places, offset - self.start))
        if first == len(self._places) or self._places[first] != offset - self.start:
            return offset, 0
        last = min(int(self._breaks[np.searchsorted(self._breaks, first)]), first + count - 1)
        return self.start + int(self._places[last]), last - first + 1
