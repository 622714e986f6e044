"""What to ask data workers for, so that a set of ranges is there afterwards. Pure.

A block whose sum is known is compared when all of it is there. A range rarely ends where a block does: the rest of its
first and last block is fetched too, as long as that adds at most EXTRA_SHARE to what is fetched, the cheapest first.
What is left, a few hundred KB at most of a model so small that blocks are large beside its layers, comes without a sum
of its own: from a node of this cluster, over TLS. It is compared as soon as another fetch completes its block.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eldric.worker.range_cache.extents import Extent, Extents

#: Most bytes that are fetched beyond those that are wanted, so that blocks can be compared, of the wanted ones.
EXTRA_SHARE = 0.01
#: Most bytes of one request, and the least that are worth one: a data worker gives way to others after so many.
SPAN_BYTES, LEAST_SPAN_BYTES = 8 << 20, 1 << 20
#: Most bytes of a piece that no sum belongs to.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """The SHA-256 of the bytes of an extent. what: for people."""

    extent: Extent
    sha256: bytes
    what: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are fetched, compared and written at once. check: of at least these bytes; the others are there."""

    file: int
    extent: Extent
    check: Check | None = None

    def whole(self) -> "Piece":
        """All that is compared, when what was there before is in doubt."""
        return self if self.check is None else Piece(self.file, self.check.extent, self.check)


@dataclass(frozen=True, slots=True)
class Span:
    """Pieces that follow one another in one file: one request."""

    pieces: tuple[Piece, ...]

    @property
    def file(self) -> int:
        return self.pieces[0].file

    @property
    def extent(self) -> Extent:
        return Extent(self.pieces[0].extent.start, self.pieces[-1].extent.stop)


def plan_pieces(
    wanted: Mapping[int, Sequence[Extent]], have: Sequence[Extents], checks: Mapping[int, Sequence[Check]]
) -> list[Piece]:
    """What to fetch, in the order of the files.

    wanted: extents by file. have: what is there, of each file. checks: by file, sorted, not overlapping.
    """
    exact: list[Piece] = []
    partial: list[tuple[int, Check, list[Extent]]] = []
    spare = 0.0
    for file, extents in wanted.items():
        missing = [gap for extent in Extents(extents) for gap in have[file].missing(extent)]
        spare += EXTRA_SHARE * sum(map(len, missing))
        for check, parts in _by_check(missing, checks.get(file, ())):
            if check is None:
                exact += [Piece(file, part) for part in _cut(parts, PIECE_BYTES)]
            elif not have[file].union(parts).missing(check.extent):
                exact.append(Piece(file, _hull(parts), check))
            else:
                partial.append((file, check, parts))
    for file, check, parts in sorted(partial, key=lambda each: _extra(have[each[0]], each[1], each[2])):
        extra = _extra(have[file], check, parts)
        if extra <= spare:
            spare -= extra
            exact.append(Piece(file, _hull(have[file].missing(check.extent)), check))
        else:
            exact += [Piece(file, part) for part in _cut(parts, PIECE_BYTES)]
    return sorted(exact, key=lambda piece: (piece.file, piece.extent.start))


def plan_spans(pieces: Sequence[Piece], connections: int) -> list[Span]:
    """Sorted pieces as requests: of one piece that is longer, or of at most `span_bytes` of what is left."""
    spans: list[list[Piece]] = []
    left = sum(len(piece.extent) for piece in pieces)
    most_bytes = 0
    for piece in pieces:
        last = spans[-1] if spans else []
        follows = last and last[-1].file == piece.file and last[-1].extent.stop == piece.extent.start
        if follows and piece.extent.stop - last[0].extent.start <= most_bytes:
            last.append(piece)
        else:
            spans.append([piece])
            most_bytes = span_bytes(left, connections)
        left -= len(piece.extent)
    return [Span(tuple(each)) for each in spans]


def span_bytes(left_bytes: int, connections: int) -> int:
    """Most bytes of a span, when so many are left to be asked for: shorter ones in the end, so that all connections
    come to an end at about the same time."""
    return max(LEAST_SPAN_BYTES, min(SPAN_BYTES, left_bytes // (2 * max(1, connections))))


def _by_check(missing: Iterable[Extent], checks: Sequence[Check]) -> list[tuple[Check | None, list[Extent]]]:
    """The missing parts of each check's extent; those of none one by one."""
    found: dict[int, list[Extent]] = defaultdict(list)
    loose: list[Extent] = []
    for gap in missing:
        rest = Extents([gap])
        for number in _overlapping(checks, gap):
            extent = checks[number].extent
            found[number].append(Extent(max(gap.start, extent.start), min(gap.stop, extent.stop)))
            rest = rest.without(extent)
        loose += rest
    return [*((checks[number], parts) for number, parts in found.items()), *((None, [part]) for part in loose)]


def _overlapping(checks: Sequence[Check], gap: Extent) -> range:
    """Numbers of the checks that share bytes with `gap`."""
    low, high = 0, len(checks)
    while low < high:
        middle = (low + high) // 2
        if checks[middle].extent.stop <= gap.start:
            low = middle + 1
        else:
            high = middle
    end = low
    while end < len(checks) and checks[end].extent.start < gap.stop:
        end += 1
    return range(low, end)


def _extra(have: Extents, check: Check, parts: Sequence[Extent]) -> int:
    """Bytes beyond those wanted that make the check's extent whole, what lies between its gaps included."""
    return len(_hull(have.missing(check.extent))) - sum(len(part) for part in parts)


def _hull(parts: Sequence[Extent]) -> Extent:
    return Extent(parts[0].start, parts[-1].stop)


def _cut(parts: Iterable[Extent], most_bytes: int) -> list[Extent]:
    return [
        Extent(start, min(start + most_bytes, part.stop))
        for part in parts
        for start in range(part.start, part.stop, most_bytes)
    ]
