"""Which bytes of a file are there. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Extents:
    """A set of bytes, as sorted extents that neither overlap nor touch. Not thread-safe."""

    __slots__ = ("_all",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._all: list[Extent] = []
        for extent in sorted(extents, key=lambda each: each.start):
            if not len(extent):
                continue
            if self._all and extent.start <= self._all[-1].stop:
                self._all[-1] = Extent(self._all[-1].start, max(self._all[-1].stop, extent.stop))
            else:
                self._all.append(extent)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and self._all == other._all

    def __repr__(self) -> str:
        return f"Extents({self._all})"

    @property
    def nbytes(self) -> int:
        return sum(len(extent) for extent in self._all)

    def union(self, extents: Iterable[Extent]) -> "Extents":
        return Extents([*self._all, *extents])

    def without(self, taken: Extent) -> "Extents":
        parts: list[Extent] = []
        for extent in self._all:
            parts.append(Extent(extent.start, max(extent.start, min(extent.stop, taken.start))))
            parts.append(Extent(min(extent.stop, max(extent.start, taken.stop)), extent.stop))
        return Extents(parts)

    def missing(self, wanted: Extent) -> list[Extent]:
        """The parts of `wanted` that are not there, in order."""
        gaps, at = [], wanted.start
        for extent in self._all:
            if extent.stop <= at:
                continue
            if extent.start >= wanted.stop:
                break
            if extent.start > at:
                gaps.append(Extent(at, extent.start))
            at = extent.stop
        if at < wanted.stop:
            gaps.append(Extent(at, wanted.stop))
        return gaps

    def covers(self, wanted: Extent) -> bool:
        return not self.missing(wanted)

    def as_lists(self) -> list[list[int]]:
        """For JSON."""
        return [[extent.start, extent.stop] for extent in self._all]

    @classmethod
    def from_lists(cls, document: Any, size_bytes: int) -> "Extents":
        """What as_lists gave, of a file of this size. Raises ValueError for anything else."""
        if not isinstance(document, list):
            raise ValueError("extents are a list")
        extents = []
        for pair in document:
            match pair:
                case [int(start), int(stop)] if 0 <= start < stop <= size_bytes:
                    extents.append(Extent(start, stop))
                case _:
                    raise ValueError(f"{pair!r:.80} is no extent of a file of {size_bytes} bytes")
        return cls(extents)
