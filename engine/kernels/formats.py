"""How each quantized type lies in a panel: packed from the file's blocks, and unfolded to bytes for multiplying.

A panel holds `lanes` rows of a matrix, block column by block column. What is one number per row in the file is a vector
with a lane per row here; four consecutive quantized values of a row are the four bytes of a lane, a *unit*. A block in
a panel is a head (the rows' scales) and one or more segments of the same shape; a segment has one integer sum, and one
scale, for every `run` values.

Blocks of the file: ggml-common.h (`block_q4_0` and so on) and `dequantize_row_*` in ggml-quants.c of ggml 0.26.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

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


class Q4_0(Format):  # noqa: N801  the type's own name
    """d, 32 nibbles: d * (q - 8). Byte i of the file holds values i and i + 16."""

    kind = TensorType.Q4_0
    bias, most_unsigned = 8, 15
    head_units, segment_units = 2, 16

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 0, target, 0, lane)
        self._copy_units(code, 4, source, 2, target, self.head_bytes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return (self._half(code, block, 0),)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        yield Part(self._nibbles(code, segment), head[0], None)

    def _nibbles(self, code: Code, segment: Value) -> list[Value]:
        units = [self._unit(code, segment, UNIT * self.lanes * index) for index in range(4)]
        return [self._masked(code, unit, shift, 15) for shift in (0, 4) for unit in units]


class Q4_1(Q4_0):  # noqa: N801
    """d, m, 32 nibbles: d * q + m."""

    kind = TensorType.Q4_1
    bias, has_least = 0, True
    head_units = 4

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 0, target, 0, lane)
        negated = code.b.fneg(code.load(HALF, source, 2))
        self._put(code, negated, target, 2 * self.lanes, lane)
        self._copy_units(code, 4, source, 4, target, self.head_bytes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return self._half(code, block, 0), self._half(code, block, 2 * self.lanes)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        yield Part(self._nibbles(code, segment), *head)


class Q5_0(Q4_0):  # noqa: N801
    """d, 32 fifth bits, 32 nibbles: d * (q - 16). In a panel, bit u of byte b belongs to byte b of unit u."""

    kind = TensorType.Q5_0
    bias, most_unsigned = 16, 31
    head_units, segment_units = 2, 20

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 0, target, 0, lane)
        self._put(code, self._planes(code, code.load(I32, source, 2)), target, self.head_bytes, lane)
        self._copy_units(code, 4, source, 6, target, self.head_bytes + UNIT * self.lanes, lane)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        fifth = self._unit(code, segment, 0)
        nibbles = self._nibbles(code, code.at(segment, UNIT * self.lanes))
        units = [code.b.or_(nibble, self._masked(code, fifth, index - 4, 16)) for index, nibble in enumerate(nibbles)]
        yield Part(units, head[0], None)

    def _planes(self, code: Code, bits: Value) -> Value:
        """Bit 4 u + b to bit u of byte b: the four bits of a unit spread over four bytes by a product."""
        planes: Value = I32(0)
        for unit in range(8):
            nibble = code.b.and_(code.b.lshr(bits, I32(4 * unit)), I32(15))
            spread = code.b.and_(code.b.mul(nibble, I32(0x00204081)), I32(0x01010101))
            planes = code.b.or_(planes, code.b.shl(spread, I32(unit)))
        return planes


class Q8_0(Format):  # noqa: N801
    """d, 32 signed bytes: d * q."""

    kind = TensorType.Q8_0
    bias, most_unsigned = 128, 255
    head_units, segment_units = 2, 32

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 0, target, 0, lane)
        self._copy_units(code, 8, source, 2, target, self.head_bytes, lane, flip=0x80808080)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return (self._half(code, block, 0),)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        units = [self._unit(code, segment, UNIT * self.lanes * index) for index in range(8)]
        yield Part(units, head[0], None)


class Q4_K(Format):  # noqa: N801
    """d, dmin, 8 pairs of 6-bit scale and minimum, 256 nibbles: d * scale * q - dmin * minimum.

    A segment is 64 values: 32 bytes of the file, whose low nibbles come first.
    """

    kind = TensorType.Q4_K
    segments, has_least, most_unsigned = 4, True, 15
    head_units, segment_units = 4, 4 + 32
    quants = 16  # where the nibbles begin in the file's block
    nibbles = 4  # where they begin in a segment, for one lane

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        for index in range(2):
            self._copy(code, HALF, source, 2 * index, target, 2 * self.lanes * index, lane)
        for index in range(8):
            segment = self.head_bytes + index // 2 * self.segment_bytes
            for number, value in enumerate(self._scale_and_minimum(code, source, index)):
                self._put(code, value, target, segment + (2 * number + index % 2) * self.lanes, lane)
        for index in range(self.segments):
            to = self.head_bytes + index * self.segment_bytes + self.nibbles * self.lanes
            self._copy_units(code, 8, source, self.quants + 32 * index, target, to, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return self._half(code, block, 0), self._half(code, block, 2 * self.lanes)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        for half in range(2):
            units = self._units(code, segment, half)
            scale = code.b.fmul(head[0], self._bytes(code, segment, half * self.lanes))
            least = code.b.fmul(head[1], self._bytes(code, segment, (2 + half) * self.lanes))
            yield Part(units, scale, least)

    def _units(self, code: Code, segment: Value, half: int) -> list[Value]:
        at = [self.lanes * (self.nibbles + UNIT * index) for index in range(8)]
        return [self._masked(code, self._unit(code, segment, offset), 4 * half, 15) for offset in at]

    def _scale_and_minimum(self, code: Code, source: Value, index: int) -> tuple[Value, Value]:
        """get_scale_min_k4: twelve bytes hold eight pairs of six bits."""
        b = code.b

        def byte(number: int) -> Value:
            return code.load(BYTE, source, 4 + number)

        if index < 4:
            return b.and_(byte(index), BYTE(63)), b.and_(byte(index + 4), BYTE(63))
        scale = b.or_(b.and_(byte(index + 4), BYTE(15)), b.shl(b.lshr(byte(index - 4), BYTE(6)), BYTE(4)))
        minimum = b.or_(b.lshr(byte(index + 4), BYTE(4)), b.shl(b.lshr(byte(index), BYTE(6)), BYTE(4)))
        return scale, minimum


class Q5_K(Q4_K):  # noqa: N801
    """As Q4_K, with a fifth bit: bit s of byte l of 32 belongs to value 32 s + l. In a panel it lies as in Q5_0."""

    kind = TensorType.Q5_K
    most_unsigned = 31
    segment_units, quants, nibbles = 4 + 8 + 32, 48, 12

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        super().pack(code, source, target, lane)
        bits = [code.load(I32, source, 16 + UNIT * index) for index in range(8)]
        for run in range(8):
            planes: Value = I32(0)
            for index, unit in enumerate(bits):
                own = code.b.and_(code.b.lshr(unit, I32(run)), I32(0x01010101))
                planes = code.b.or_(planes, code.b.shl(own, I32(index)))
            segment = self.head_bytes + run // 2 * self.segment_bytes
            self._put(code, planes, target, segment + (4 + UNIT * (run % 2)) * self.lanes, lane)

    def _units(self, code: Code, segment: Value, half: int) -> list[Value]:
        fifth = self._unit(code, segment, (4 + UNIT * half) * self.lanes)
        return [
            code.b.or_(nibble, self._masked(code, fifth, index - 4, 16))
            for index, nibble in enumerate(super()._units(code, segment, half))
        ]


class Q6_K(Format):  # noqa: N801
    """d, 16 signed scales, 256 values of 6 bits: d * scale * (q - 32). A segment is 128 values.

    In each half of the file's block, value 32 i + l has its low bits in nibble i // 2 of byte l + 32 (i % 2), and its
    high ones in bits 2 i of byte l of the high bits.
    """

    kind = TensorType.Q6_K
    segments, run, bias, most_unsigned = 2, 16, 32, 63
    head_units, segment_units = 2, 8 + 64 + 32

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 208, target, 0, lane)
        for index in range(2):
            segment = self.head_bytes + index * self.segment_bytes
            for number in range(8):
                at = 192 + 8 * index + number
                self._copy(code, BYTE, source, at, target, segment + number * self.lanes, lane)
            low = segment + 8 * self.lanes
            self._copy_units(code, 16, source, 64 * index, target, low, lane)
            self._copy_units(code, 8, source, 128 + 32 * index, target, low + 64 * self.lanes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return (self._half(code, block, 0),)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        low, high = 8 * self.lanes, 72 * self.lanes
        for part in range(8):
            quarter, first = part // 2, part % 2 * 4
            units = []
            for index in range(first, first + 4):
                nibbles = self._unit(code, segment, low + UNIT * self.lanes * (quarter % 2 * 8 + index))
                bits = self._unit(code, segment, high + UNIT * self.lanes * index)
                nibble = self._masked(code, nibbles, quarter // 2 * 4, 15)
                units.append(code.b.or_(nibble, self._masked(code, bits, 2 * quarter - 4, 48)))
            scale = code.b.fmul(head[0], self._bytes(code, segment, part * self.lanes, signed=True))
            yield Part(units, scale, None)


FORMATS: dict[TensorType, type[Format]] = {each.kind: each for each in (Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K, Q6_K)}
