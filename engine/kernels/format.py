"""What all quantized types in panels have in common: packed from the file's blocks, unfolded to bytes for multiplying.

A panel holds `lanes` rows of a matrix, block column by block column. What is one number per row in the file is a vector
with a lane per row here; four consecutive quantized values of a row are the four bytes of a lane, a *unit*. A block in
a panel is a head (the rows' scales) and one or more segments of the same shape; a segment has one integer sum, and one
scale, for every `run` values.

The types: eldric.engine.kernels.formats.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from llvmlite import ir

from eldric.engine.kernels.code import BYTE, FLOAT, HALF, I32, I64, Code, Value, constant, vector
from eldric.engine.tensor_types import TensorType

UNIT = 4  # values


class Part(NamedTuple):
    """The values of one sum, of all rows of a panel: value = scale * unsigned byte (- bias) - least."""

    units: list[Value]  # vectors of 32-bit lanes, each of 4 unsigned bytes
    scale: Value  # vector of f32
    least: Value | None  # vector of f32, for types with a minimum


class Format(ABC):
    """One tensor type in panels. Sizes in bytes are for a number of lanes."""

    kind: ClassVar[TensorType]
    segments: ClassVar[int] = 1  # of a block
    run: ClassVar[int] = 32  # values under one scale
    bias: ClassVar[int] = 0  # what an unsigned byte is above the value that it stands for
    most_unsigned: ClassVar[int]
    has_least: ClassVar[bool] = False
    head_units: ClassVar[int]  # bytes of a row in a block's head
    segment_units: ClassVar[int]  # bytes of a row in a segment

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.block = self.kind.block_size
        self.runs = self.block // self.segments // self.run  # sums of a segment
        self.head_bytes = self.head_units * lanes
        self.segment_bytes = self.segment_units * lanes
        self.block_bytes = self.head_bytes + self.segments * self.segment_bytes
        self.ints, self.floats = vector(I32, lanes), vector(FLOAT, lanes)

    @abstractmethod
    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        """Write one row's block into a panel's block. source: the file's block; lane: the row, an I64."""

    @abstractmethod
    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        """What the segments of a block need of its head."""

    @abstractmethod
    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        """Unfold a segment, `run` values after `run` values."""

    def _half(self, code: Code, block: Value, offset: int) -> Value:
        """A number per row, kept in 16 bits."""
        return code.b.fpext(code.load(vector(HALF, self.lanes), block, offset), self.floats)

    def _bytes(self, code: Code, segment: Value, offset: int, signed: bool = False) -> Value:
        """A number per row, kept in 8 bits, as f32."""
        loaded = code.load(vector(BYTE, self.lanes), segment, offset)
        convert, widen = (code.b.sitofp, code.b.sext) if signed else (code.b.uitofp, code.b.zext)
        return convert(widen(loaded, self.ints), self.floats)

    def _unit(self, code: Code, segment: Value, offset: int) -> Value:
        return code.load(self.ints, segment, offset)

    def _masked(self, code: Code, unit: Value, shift: int, mask: int) -> Value:
        """Bytes of a unit, shifted right (left if negative), under the same mask each."""
        if shift > 0:
            unit = code.b.lshr(unit, constant(self.ints, shift))
        elif shift < 0:
            unit = code.b.shl(unit, constant(self.ints, -shift))
        return code.b.and_(unit, constant(self.ints, mask * 0x01010101))

    def _looked_up(self, code: Code, unit: Value, table: Sequence[int]) -> Value:
        """Each byte of a unit, 0 to 15, as the number of a table of 16 bytes."""
        kind = vector(BYTE, UNIT * self.lanes)
        shuffle = "llvm.x86.avx512.pshuf.b.512" if self.lanes == 16 else "llvm.x86.avx2.pshuf.b"
        numbers = ir.Constant(kind, [BYTE(value) for value in [*table] * (self.lanes // 4)])
        return code.b.bitcast(code.call(shuffle, kind, numbers, code.b.bitcast(unit, kind)), self.ints)

    def _copy(self, code: Code, kind: Value, source: Value, at: int, target: Value, to: int, lane: Value) -> None:
        """One number of the file's block to its lane of the vector at `to`."""
        self._put(code, code.load(kind, source, at), target, to, lane)

    def _put(self, code: Code, value: Value, target: Value, to: int, lane: Value) -> None:
        size = 2 if value.type is HALF else value.type.width // 8
        code.store(value, code.at(target, code.b.mul(lane, I64(size))), to)

    def _copy_units(
        self, code: Code, count: int, source: Value, at: int, target: Value, to: int, lane: Value, flip: int = 0
    ) -> None:
        """Consecutive units of the file's block, each to its lane of consecutive vectors."""
        for index in range(count):
            unit = code.load(I32, source, at + UNIT * index)
            if flip:
                unit = code.b.xor(unit, I32(flip))
            self._put(code, unit, target, to + UNIT * self.lanes * index, lane)
