"""Brings a shard's bytes into the page cache ahead of whoever maps them, from a process that may hang in our stead.

So a server that fails or stops is an error of the load, never a fault when a page is touched.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from eldric.engine.errors import ModelUnreadable
from eldric.engine.shard import ByteRange
from eldric.errors import DeadlineExceeded
from eldric.worker.mounted.process import Child, Silent

#: A load fails when no byte came for so long, in seconds. While bytes move it may take as long as they need.
STALL_S = 10.0
#: How far reading may be ahead of mapping, in bytes: what is read and not used yet takes memory.
WINDOW_BYTES = 32 << 20
#: How much is used up between two words of it to the reader.
_STEP_BYTES = 4 << 20


class ReadAhead:
    """Reads ranges in their order. Called with (file, offset, length) it returns when these bytes are there.

    An engine's `fetch`, for the thread that loads. Raises ModelUnreadable when reading fails, DeadlineExceeded when
    nothing comes any more, LoadCancelled when `cancelled` says so.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        ranges: Sequence[ByteRange],
        cancelled: Callable[[], bool],
        stall_s: float = STALL_S,
    ) -> None:
        """ranges: all that will be asked for, sorted by file and offset."""
        self._paths, self._cancelled, self._stall_s = paths, cancelled, stall_s
        self._starts = [(each.file, each.offset) for each in ranges]
        self._before = list(accumulate((each.length for each in ranges), initial=0))
        self._done = self._told = 0
        self._child = Child(
            "read",
            {
                "files": [str(path) for path in paths],
                "ranges": [[each.file, each.offset, each.length] for each in ranges],
                "window": WINDOW_BYTES,
            },
        )

    def __call__(self, file: int, offset: int, length: int) -> None:
        start = self._position(file, offset)
        least = start + length - WINDOW_BYTES  # what must count as used up, or the reader stops before these bytes
        if start >= self._told + _STEP_BYTES or least > self._told:
            self._told = max(start, least)
            self._child.say(str(self._told))
        try:
            while self._done < start + length:
                self._done = int(self._child.line(self._stall_s, self._cancelled))
        except Silent:
            raise DeadlineExceeded(
                f"no byte of {self._paths[file]} came for {self._stall_s:g} s, after {self._done} of "
                f"{self._before[-1]} bytes: its file server hangs"
            ) from None
        except OSError as error:
            at = f"after {self._done} of {self._before[-1]} bytes"
            raise ModelUnreadable(f"{self._paths[file]} cannot be read, {at}: {error.strerror}") from error

    def _position(self, file: int, offset: int) -> int:
        """How many bytes of the ranges come before this one."""
        index = bisect_right(self._starts, (file, offset)) - 1
        return self._before[index] + offset - self._starts[index][1]

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
