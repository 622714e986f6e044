"""Which layout of a weight matrix is used when, and which results do not depend on the rows beside them.

Everything here was measured on ggml 0.25 and 0.26 (`benchmarks/engine.py` prints the table), on an x86-64 with AVX-512.
A *repacked* matrix is a private copy in the CPU's own interleaved layout; a *mapped* one is the file's bytes.
"""

from collections.abc import Collection
from enum import Enum

from eldric.engine.tensor_types import TensorType


class Layout(Enum):
    MAPPED = "mapped"
    REPACKED = "repacked"


# From this many rows on the mapped matrix is the faster one, for the types whose repacked copy is worth its memory.
# None: the repacked one always is, so the mapped one is dropped.
_MAPPED_FROM_ROWS: dict[TensorType, int | None] = {
    TensorType.Q4_0: None,
    TensorType.IQ4_NL: None,
    TensorType.Q4_K: 10,
}

# Types whose mapped matrices change kernel, and with it the bits of a result, from some number of rows on.
_TILED = frozenset(
    kind
    for kind in TensorType
    if kind.name.endswith("_K") or (kind.name.startswith("IQ") and kind is not TensorType.IQ4_NL)
)
_ATTENTION_BOUND = 63  # rows of one product with the same bits as a row alone, whatever the type
_TILED_BOUND = 7
_REPACKED_K_BOUND = 3


def worth_repacking(kind: TensorType) -> bool:
    return kind in _MAPPED_FROM_ROWS


def keeps_mapped(kind: TensorType) -> bool:
    """Whether a repacked matrix is wanted in the file's layout too."""
    return _MAPPED_FROM_ROWS.get(kind) is not None


def better_layout(kind: TensorType, rows: int) -> Layout:
    """The faster layout of a matrix that has both, for a product of so many rows."""
    bound = _MAPPED_FROM_ROWS.get(kind)
    return Layout.REPACKED if bound is None or rows < bound else Layout.MAPPED


def exact_rows(kind: TensorType, layout: Layout) -> int:
    """Most rows of one product in which each row gets the bits that it gets alone."""
    if kind not in _TILED:
        return _ATTENTION_BOUND
    return _REPACKED_K_BOUND if layout is Layout.REPACKED else _TILED_BOUND


def padded_rows(kinds: Collection[TensorType], rows: int) -> int:
    return rows
