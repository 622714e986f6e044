"""Types whose blocks have 32 values under one scale.

Blocks of the file: ggml-common.h (`block_q4_0` and so on) and `dequantize_row_*` in ggml-quants.c of ggml 0.26.
"""

from collections.abc import Iterator

from eldric.engine.kernels.code import HALF, I32, Code, Value
from eldric.engine.kernels.format import UNIT, Format, Part
from eldric.engine.kernels.iq4 import BIAS, TABLE
from eldric.engine.tensor_types import TensorType


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
        self._copy_scale_and_minimum(code, source, target, lane)
        self._copy_units(code, 4, source, 4, target, self.head_bytes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return self._scale_and_least(code, block)

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
        yield Part(self._units(code, segment), head[0], None)

    def _units(self, code: Code, segment: Value) -> list[Value]:
        fifth = self._unit(code, segment, 0)
        nibbles = self._nibbles(code, code.at(segment, UNIT * self.lanes))
        return [code.b.or_(nibble, self._masked(code, fifth, index - 4, 16)) for index, nibble in enumerate(nibbles)]

    def _planes(self, code: Code, bits: Value) -> Value:
        """Bit 4 u + b to bit u of byte b: the four bits of a unit spread over four bytes by a product."""
        planes: Value = I32(0)
        for unit in range(8):
            nibble = code.b.and_(code.b.lshr(bits, I32(4 * unit)), I32(15))
            spread = code.b.and_(code.b.mul(nibble, I32(0x00204081)), I32(0x01010101))
            planes = code.b.or_(planes, code.b.shl(spread, I32(unit)))
        return planes


class Q5_1(Q5_0):  # noqa: N801
    """d, m, 32 fifth bits, 32 nibbles: d * q + m."""

    kind = TensorType.Q5_1
    bias, has_least = 0, True
    head_units = 4

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy_scale_and_minimum(code, source, target, lane)
        self._put(code, self._planes(code, code.load(I32, source, 4)), target, self.head_bytes, lane)
        self._copy_units(code, 4, source, 8, target, self.head_bytes + UNIT * self.lanes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return self._scale_and_least(code, block)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        yield Part(self._units(code, segment), *head)


class IQ4_NL(Q4_0):  # noqa: N801
    """d, 32 nibbles, each the number of one of 16 values: d * VALUES[q]."""

    kind = TensorType.IQ4_NL
    bias, most_unsigned = BIAS, max(TABLE)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        units = [self._looked_up(code, unit, TABLE) for unit in self._nibbles(code, segment)]
        yield Part(units, head[0], None)


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
