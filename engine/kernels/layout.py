"""What `product` needs to know of a type's matrices in panels: sizes, and the functions that differ by type."""

from abc import ABC, abstractmethod
from typing import ClassVar

from eldric.engine.kernels.code import Code, Value
from eldric.engine.kernels.isa import Isa
from eldric.engine.tensor_types import TensorType

_PREFETCH_BYTES = 3072  # how far ahead; measured with 1 to 8 rows


class Layout(ABC):
    """A type's matrices in panels of `lanes` rows, block column by block column, and rows of activations in tiles."""

    kind: ClassVar[TensorType]
    lanes: int
    block: int  # values of a row in a block
    block_bytes: int  # of a panel

    @property
    @abstractmethod
    def source_bytes(self) -> int:
        """Bytes of a row's block in the file."""

    @property
    @abstractmethod
    def heights(self) -> list[int]:
        """Rows of tiles. More of them share the work of unfolding weights, until the registers are full."""

    @property
    @abstractmethod
    def tile_row_bytes(self) -> int:
        """Bytes of one row of a tile in one block column."""

    @abstractmethod
    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        """Write one row's block into a panel's block. source: the file's block; lane: the row, an I64."""

    @abstractmethod
    def write_fill(self, module: Value) -> None:
        """fill(row of f32, blocks, its tile, rows of the tile, the row's number in it)."""

    @abstractmethod
    def write_tile(self, module: Value, isa: Isa, rows: int) -> None:
        """tile_N(panel, blocks, tile of N rows, result, bytes between its rows): lanes of N rows of the result."""


def prefetch(code: Code, panel: Value, nbytes: int) -> None:
    """Ask for so many bytes of a panel that will be read soon."""
    for ahead in range(0, nbytes, 64):
        code.prefetch(panel, _PREFETCH_BYTES + ahead)
