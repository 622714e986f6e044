"""Sums of files and of their blocks."""

import hashlib
import random
from pathlib import Path

import pytest

from eldric.data.checksums import BLOCK_BYTES, FileSums, Hasher, blocks_of, copy_with_sums, sums_of


def expected(data: bytes) -> FileSums:
    blocks = [data[begin : begin + BLOCK_BYTES] for begin in range(0, len(data), BLOCK_BYTES)]
    return FileSums(hashlib.sha256(data).hexdigest(), tuple(hashlib.sha256(block).hexdigest() for block in blocks))


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
def test_a_file_has_one_sum_for_each_block_however_its_bytes_come(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    hasher = Hasher()
    for begin in range(0, size, 300_001):
        hasher.update(data[begin : begin + 300_001])
    assert hasher.sums() == expected(data) == sums_of(path, lambda _: None)
    assert copy_with_sums(path, tmp_path / "copy", lambda _: None) == expected(data)
    assert len(expected(data).blocks) == blocks_of(size)


@pytest.mark.parametrize("size", [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_a_block_that_came_wrong_can_be_taken_back(size: int) -> None:
    data = random.Random(size).randbytes(size)
    begin = (size - 1) // BLOCK_BYTES * BLOCK_BYTES
    hasher = Hasher()
    hasher.update(data[:begin])
    hasher.update(bytes(size - begin))
    assert hasher.newest_block() == hashlib.sha256(bytes(size - begin)).hexdigest()
    hasher.forget_block()
    hasher.update(data[begin:])
    assert hasher.sums() == expected(data)


def test_damaged_blocks_are_counted_from_zero() -> None:
    kept = FileSums("x", ("a", "b", "c"))
    assert kept.damaged_blocks(FileSums("y", ("a", "-", "c"))) == [1]
    assert kept.damaged_blocks(kept) == []
