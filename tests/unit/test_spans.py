"""What is asked of data workers: all that is missing, little more, and as much of it comparable as that allows."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from eldric.worker.range_cache.extents import Extent, Extents
from eldric.worker.range_cache.spans import (
    EXTRA_SHARE,
    LEAST_SPAN_BYTES,
    SPAN_BYTES,
    Check,
    Piece,
    plan_pieces,
    plan_spans,
    span_bytes,
)

MIB = 1 << 20


def blocks(size: int, block: int = MIB) -> list[Check]:
    starts = range(0, size, block)
    return [Check(Extent(start, min(start + block, size)), b"", f"{start // block}") for start in starts]


def covered(pieces: Sequence[Piece]) -> Extents:
    return Extents(piece.extent for piece in pieces)


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), max_size=4),
)
def test_a_plan_brings_what_is_missing_and_at_most_a_hundredth_more(
    wanted: list[tuple[int, int]], have: list[tuple[int, int]]
) -> None:
    asked = [Extent(start, start + length) for start, length in wanted]
    there = Extents(Extent(start, start + length) for start, length in have)
    missing = sum(len(gap) for part in Extents(asked) for gap in there.missing(part))
    pieces = plan_pieces({0: asked}, [there], {0: blocks(1200, 64)})
    after = there.union(piece.extent for piece in pieces)
    assert all(after.covers(part) for part in asked)
    for piece in pieces:
        if piece.check is not None:
            assert after.covers(piece.check.extent), "what is compared is there as a whole"
    fetched = sum(len(piece.extent) for piece in pieces)
    new = sum(len(gap) for piece in pieces for gap in there.missing(piece.extent))
    assert new <= missing + EXTRA_SHARE * missing
    assert fetched == covered(pieces).nbytes, "no byte twice"


def test_whole_blocks_are_compared_and_edges_when_that_costs_little() -> None:
    wanted = Extent(10 * MIB - 1000, 400 * MIB + MIB // 2)
    pieces = plan_pieces({0: [wanted]}, [Extents()], {0: blocks(500 * MIB)})
    assert all(piece.check for piece in pieces)
    assert covered(pieces) == Extents([Extent(9 * MIB, 401 * MIB)])


def test_edges_of_a_small_range_come_without_a_sum() -> None:
    wanted = Extent(MIB // 2, 2 * MIB + MIB // 2)
    pieces = plan_pieces({0: [wanted]}, [Extents()], {0: blocks(4 * MIB)})
    assert covered(pieces) == Extents([wanted])
    assert [piece.check is not None for piece in pieces] == [False, True, False]


def test_what_completes_a_block_is_compared_with_it() -> None:
    there = Extents([Extent(0, MIB // 2)])
    (piece,) = plan_pieces({0: [Extent(MIB // 2, MIB)]}, [there], {0: blocks(MIB)})
    assert piece.extent == Extent(MIB // 2, MIB) and piece.check is not None
    assert piece.whole().extent == Extent(0, MIB)


def test_nothing_is_asked_for_twice() -> None:
    there = Extents([Extent(0, 3 * MIB)])
    assert plan_pieces({0: [Extent(MIB, 2 * MIB)]}, [there], {0: blocks(4 * MIB)}) == []


def test_spans_are_contiguous_of_one_file_and_bounded() -> None:
    pieces = plan_pieces(
        {0: [Extent(0, 20 * MIB)], 1: [Extent(0, 3 * MIB)]},
        [Extents([Extent(4 * MIB, 5 * MIB)]), Extents()],
        {0: blocks(20 * MIB), 1: blocks(3 * MIB)},
    )
    spans = plan_spans(pieces, 1)
    assert [piece for span in spans for piece in span.pieces] == pieces
    for span in spans:
        assert len(span.extent) == sum(len(piece.extent) for piece in span.pieces) <= SPAN_BYTES
        assert {piece.file for piece in span.pieces} == {span.file}
    assert [len(span.extent) // MIB for span in spans] == [4, 8, 5, 2, 1, 1, 1]


def test_a_piece_longer_than_a_span_is_one_request() -> None:
    header = Check(Extent(0, 2 * SPAN_BYTES), b"", "the header")
    (span,) = plan_spans(plan_pieces({0: [header.extent]}, [Extents()], {0: [header]}), 4)
    assert span.extent == header.extent


def test_spans_are_short_where_little_is_left_so_that_every_connection_gets_some() -> None:
    assert span_bytes(8 * MIB, 4) == MIB == LEAST_SPAN_BYTES
    assert span_bytes(80 * MIB, 8) == 5 * MIB
    assert span_bytes(10_000 * MIB, 8) == SPAN_BYTES
    assert span_bytes(10, 0) == LEAST_SPAN_BYTES
