"""Which bytes of a fetch are there already: who fetches tells, and who reads waits. Knows no socket and no file."""

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.spans import Piece


class Arrivals:
    """Of one fetch. Thread-safe.

    What is compared as a whole also arrives as a whole: bytes that were there before count as missing again while a
    piece that completes their block is.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wholes: dict[int, list[Extent]] = {}  # by file, sorted, not overlapping; empty until a fetch expects some
        self._pending: dict[int, set[Extent]] = {}
        self._is_known = False
        self._is_over = False
        self._error: BaseException | None = None

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These are missing, and nothing else is."""
        wholes: dict[int, list[Extent]] = defaultdict(list)
        for piece in pieces:
            wholes[piece.file].append(piece.whole().extent)
        with self._changed:
            self._wholes = {file: sorted(extents, key=lambda each: each.start) for file, extents in wholes.items()}
            self._pending = {file: set(extents) for file, extents in wholes.items()}
            self._is_known = True
            self._changed.notify_all()

    def came(self, piece: Piece) -> None:
        """A piece was compared and written."""
        with self._changed:
            self._pending[piece.file].discard(piece.whole().extent)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes. error: why something is missing."""
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()

    def wait(self, file: int, wanted: Extent) -> None:
        """Until these bytes are there. Raises what the fetch ended with if they will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._is_there(file, wanted))
            if self._error is not None and not self._is_there(file, wanted):
                raise self._error

    def _is_there(self, file: int, wanted: Extent) -> bool:
        """With the lock held."""
        if not self._is_known:
            return False
        wholes, pending = self._wholes.get(file, []), self._pending.get(file, set())
        number = bisect_left(wholes, wanted.start, key=lambda each: each.stop - 1)
        while number < len(wholes) and wholes[number].start < wanted.stop:
            if wholes[number] in pending:
                return False
            number += 1
        return True
