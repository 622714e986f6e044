"""Amounts as a person writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldric.cli.output import human_bytes
from eldric.cli.units import parse_bytes, parse_cpus, parse_memory, parse_numbers, parse_seconds
from eldric.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("24GB", 24 * 10**9),
        ("16GiB", 16 * 2**30),
        ("500M", 500 * 10**6),
        ("1.5 kib", 1536),
        ("2t", 2 * 10**12),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "GB", "-1GB", "0", "1XB", "1e999GB", "nan", "inf", "1 2 GB", "0.1"])
def test_no_memory(text: str) -> None:
    with pytest.raises(InvalidRequest, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("45s", 45), ("30m", 1800), ("2h", 7200), ("7d", 604800)])
def test_time(text: str, seconds: int) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1h", "0", "1y", "inf", "nan d"])
def test_no_time(text: str) -> None:
    with pytest.raises(InvalidRequest, match="length of time"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", (0,)), ("0,2-5", (0, 2, 3, 4, 5)), ("3, 1", (3, 1)), ("1-2,2-3", (1, 2, 3))]
)
def test_cores(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "0-99999999999", "1,,2"])
def test_no_cores(text: str) -> None:
    with pytest.raises(InvalidRequest, match="list of cores"):
        parse_cpus(text)


@pytest.mark.parametrize(("text", "numbers"), [("", []), ("10,10,12", [10, 10, 12]), (" 1 , 2 ", [1, 2])])
def test_numbers(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["a", "1,,2", "0", "1,-2", "1.5"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(InvalidRequest, match="list of numbers"):
        parse_numbers(text)


def test_memory_is_an_amount_or_a_share() -> None:
    assert parse_memory("24GB") == (24 * 10**9, 1.0)
    assert parse_memory(" 33.5% ") == (0, 0.335)


@pytest.mark.parametrize("text", ["0%", "101%", "-1%", "%", "half%", "nan%"])
def test_no_share(text: str) -> None:
    with pytest.raises(InvalidRequest, match="share of the memory"):
        parse_memory(text)


@given(st.text(alphabet="0123456789.eE+-kKmMgGtTiIbBsShHdD ,x", max_size=12))
def test_whatever_is_written_is_a_number_or_a_clear_error(text: str) -> None:
    for parse in (parse_bytes, parse_seconds, parse_cpus, parse_numbers):
        try:
            parse(text)
        except InvalidRequest as error:
            assert repr(text) in error.message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5_080_000, "4.8 MiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text
