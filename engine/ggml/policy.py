"""Which layout of a weight matrix is used when, and which results do not depend on the rows beside them.

A matrix is *mapped* (the file's own bytes) or *packed*: a private copy in panels, which the engine's own kernels take
(eldric.engine.kernels), or in a layout of the device's own, named as ggml names the buffer type. All of this was
measured, on ggml 0.26 and an x86-64 with AVX-512 and AMX (`benchmarks/engine.py` prints speeds;
tests/integration/test_stage_exact.py holds the bits). What was not measured is not used.
"""

from collections.abc import Iterable
from typing import NamedTuple

from eldric.engine.tensor_types import TensorType

MAPPED, PANELS = "mapped", "panels"
AMX, REPACK = "AMX", "CPU_REPACK"  # tiles of Intel's matrix unit; rows interleaved for vector units

_MOST_ROWS = 64  # rows of a step up to which bits were compared


class RowRange(NamedTuple):
    """Numbers of rows of one matrix product, ends included."""

    least: int
    most: int


_ALWAYS = RowRange(1, 1 << 30)

# For how many rows the packed matrix is the faster one. Where that is not always, the mapped one is kept beside it.
_PACK: dict[str, dict[TensorType, RowRange]] = {
    AMX: {
        TensorType.Q4_0: _ALWAYS,
        TensorType.Q4_1: _ALWAYS,
        TensorType.Q8_0: _ALWAYS,
        TensorType.Q4_K: _ALWAYS,
        TensorType.Q5_K: _ALWAYS,
        TensorType.Q6_K: RowRange(4, 1 << 30),
    },
    REPACK: {
        TensorType.Q4_0: _ALWAYS,
        TensorType.Q4_K: RowRange(1, 9),
    },
}

_FLOATS = frozenset({TensorType.F32, TensorType.F16, TensorType.BF16})
_BLOCKS_OF_32 = frozenset({TensorType.Q4_0, TensorType.Q4_1, TensorType.Q5_0, TensorType.Q5_1, TensorType.Q8_0})
_K_QUANTS = frozenset({TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K})


def worth_packing(kind: TensorType, packing: str) -> bool:
    return kind in _PACK.get(packing, {})


def packed_pays(kind: TensorType, packing: str, rows: int) -> bool:
    """Whether the packed matrix is the faster one for a product of so many rows."""
    least, most = _PACK.get(packing, {}).get(kind, _ALWAYS)
    return least <= rows <= most


def keeps_mapped(kind: TensorType, packing: str) -> bool:
    """Whether a packed matrix is wanted in the file's layout too."""
    return _PACK.get(packing, {}).get(kind, _ALWAYS) != _ALWAYS


def exact_rows(kind: TensorType, layout: str) -> RowRange:
    """How many rows a product may have so that each row gets the same bits, whatever the other rows are.

    ggml takes another kernel for a single row of floats, for 8 rows or more of mapped K-quants, and for 4 or more of
    interleaved ones. The engine's own kernels take rows one by one. Nothing is promised for what was not tried.
    """
    if layout in (AMX, PANELS):
        return RowRange(1, _MOST_ROWS)
    if layout == REPACK:
        return RowRange(1, _MOST_ROWS if kind in _BLOCKS_OF_32 else 3)
    if layout == MAPPED and kind in _FLOATS:
        return RowRange(2, _MOST_ROWS)
    if layout == MAPPED and kind in _BLOCKS_OF_32:
        return RowRange(1, _MOST_ROWS)
    if layout == MAPPED and kind in _K_QUANTS:
        return RowRange(1, 7)
    return RowRange(1, 1)


def decode_rows(matrices: Iterable[tuple[TensorType, str]], rows: int) -> int:
    """For how many rows a decode step of `rows` is best computed, given the types and layouts of its matrices.

    Interleaved Q4_0 is multiplied by 4 rows at a time, and by single ones at the end, which take as long as 4.
    """
    if rows > 2 and rows % 4 >= 2 and any(layout == REPACK and kind in _BLOCKS_OF_32 for kind, layout in matrices):
        return rows + 4 - rows % 4
    return rows
