"""The Range field of HTTP."""

import pytest

from eldric.data.byte_ranges import satisfiable
from eldric.data.reader import pieces
from eldric.engine.shard import ByteRange


@pytest.mark.parametrize(
    ("field", "kept"),
    [
        ("bytes=0-9", "bytes=0-9"),
        ("bytes=90-", "bytes=90-"),
        ("bytes=-10", "bytes=-10"),
        ("bytes=-1000", "bytes=-1000"),
        ("bytes=0-1000", "bytes=0-1000"),
        ("Bytes = 0-1 , 5-6,", "bytes=0-1,5-6"),
        ("bytes=0-1,200-300", "bytes=0-1"),
        ("bytes=0-0,-0", "bytes=0-0"),
    ],
)
def test_ranges_that_a_file_has_are_kept(field: str, kept: str) -> None:
    assert satisfiable(field, 100) == kept


@pytest.mark.parametrize("field", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=500-600,-0"])
def test_ranges_past_the_end_leave_one_that_cannot_be_given(field: str) -> None:
    assert satisfiable(field, 100) == "bytes=100-"


@pytest.mark.parametrize(
    "field",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes=-",
        "bytes=5-2",
        "bytes=a-b",
        "bytes=0-1-2",
        "bytes=--1",
        "bytes=0-1,x",
        "bytes=+1-2",
        "bytes=\u0661-\u0662",
        "bytes=0x0-1",
        "items=0-1",
        "bytes=" + "9" * 60 + "-",
        "bytes=" + ",".join(["0-0"] * 101),
    ],
)
def test_what_is_no_range_is_ignored(field: str) -> None:
    assert satisfiable(field, 100) is None


def test_pieces_cover_the_ranges_in_order() -> None:
    ranges = (ByteRange(0, 10, 25), ByteRange(1, 0, 10), ByteRange(1, 50, 0))
    assert list(pieces(ranges, 10)) == [
        ByteRange(0, 10, 10),
        ByteRange(0, 20, 10),
        ByteRange(0, 30, 5),
        ByteRange(1, 0, 10),
    ]
