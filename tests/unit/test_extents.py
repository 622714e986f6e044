"""Sets of bytes, compared with sets of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldric.worker.range_cache.extents import Extent, Extents

extents = st.builds(lambda start, length: Extent(start, start + length), st.integers(0, 60), st.integers(0, 12))
sets = st.lists(extents, max_size=8)


def numbers(parts: "list[Extent] | Extents") -> set[int]:
    return {number for part in parts for number in range(part.start, part.stop)}


@given(sets, sets, extents)
def test_extents_are_a_set_of_bytes(one: list[Extent], other: list[Extent], wanted: Extent) -> None:
    known = Extents(one)
    assert numbers(known) == numbers(one) and known.nbytes == len(numbers(one))
    assert numbers(known.union(other)) == numbers(one) | numbers(other)
    assert numbers(known.without(wanted)) == numbers(one) - numbers([wanted])
    assert numbers(known.missing(wanted)) == numbers([wanted]) - numbers(one)
    assert known.covers(wanted) == (numbers([wanted]) <= numbers(one))
    for part, after in zip(list(known), list(known)[1:], strict=False):
        assert len(part) and part.stop < after.start


@given(sets)
def test_extents_survive_json(one: list[Extent]) -> None:
    assert Extents.from_lists(Extents(one).as_lists(), 100) == Extents(one)


@pytest.mark.parametrize("document", [None, {}, [[1]], [[2, 1]], [[0, 11]], [[-1, 3]], [["0", 1]], [[0.5, 1]]])
def test_what_are_no_extents_of_the_file_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="extent"):
        Extents.from_lists(document, 10)
