"""Types whose blocks have 256 values: a few numbers in 16 bits, and by them a small scale for every 16 or 32 values.

Blocks of the file: ggml-common.h (`block_q4_K` and so on) and `dequantize_row_*` in ggml-quants.c of ggml 0.26.
"""

from collections.abc import Iterator

from eldric.engine.kernels.code import BYTE, HALF, I32, Code, Value, constant, vector
from eldric.engine.kernels.format import UNIT, Format, Part
from eldric.engine.kernels.iq4 import BIAS, TABLE
from eldric.engine.tensor_types import TensorType


class Q2_K(Format):  # noqa: N801
    """16 bytes of a scale and a minimum, 256 values of 2 bits, d, dmin: d * scale * q - dmin * minimum.

    A segment is 128 values: 32 bytes of the file, whose lowest bits come first.
    """

    kind = TensorType.Q2_K
    segments, run, has_least, most_unsigned = 2, 16, True, 3
    head_units, segment_units = 4, 8 + 32

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        for index in range(2):
            self._copy(code, HALF, source, 80 + 2 * index, target, 2 * self.lanes * index, lane)
            segment = self.head_bytes + index * self.segment_bytes
            for number in range(8):
                self._copy(code, BYTE, source, 8 * index + number, target, segment + number * self.lanes, lane)
            self._copy_units(code, 8, source, 16 + 32 * index, target, segment + 8 * self.lanes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return self._scale_and_least(code, block)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        b = code.b
        for part in range(8):
            both = b.zext(code.load(vector(BYTE, self.lanes), segment, part * self.lanes), self.ints)
            scale = b.uitofp(b.and_(both, constant(self.ints, 15)), self.floats)
            minimum = b.uitofp(b.lshr(both, constant(self.ints, 4)), self.floats)
            units = self._two_bits(code, segment, 8 * self.lanes, part)
            yield Part(units, b.fmul(head[0], scale), b.fmul(head[1], minimum))

    def _two_bits(self, code: Code, segment: Value, at: int, part: int) -> list[Value]:
        """The units of a part: 16 bytes of 32, at the bits of its place."""
        first = at + part % 2 * 4 * UNIT * self.lanes
        units = [self._unit(code, segment, first + UNIT * self.lanes * index) for index in range(4)]
        return [self._masked(code, unit, part // 2 * 2, 3) for unit in units]


class Q3_K(Q2_K):  # noqa: N801
    """256 third bits, 256 values of 2 bits, 16 scales of 6 bits, d: d * (scale - 32) * (q - 4).

    Bit s of byte l of 32 is the third one of value 32 s + l. In a panel the four bits of a segment of two bytes, 16
    apart, lie in one.
    """

    kind = TensorType.Q3_K
    bias, has_least, most_unsigned = 4, False, 7
    head_units, segment_units = 2, 8 + 32 + 16

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        b = code.b
        self._copy(code, HALF, source, 108, target, 0, lane)
        for index in range(2):
            segment = self.head_bytes + index * self.segment_bytes
            for number in range(8):
                scale = self._scale(code, source, 8 * index + number)
                self._put(code, scale, target, segment + number * self.lanes, lane)
            self._copy_units(code, 8, source, 32 + 32 * index, target, segment + 8 * self.lanes, lane)
            for number in range(4):
                bits = [code.load(I32, source, UNIT * number + at) for at in (0, 16)]
                low, high = (b.and_(b.lshr(unit, I32(4 * index)), I32(0x0F0F0F0F)) for unit in bits)
                both = b.or_(low, b.shl(high, I32(4)))
                self._put(code, both, target, segment + (40 + UNIT * number) * self.lanes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return (self._half(code, block, 0),)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        for part in range(8):
            bit = part % 2 * 4 + part // 2
            units = []
            for index, low in enumerate(self._two_bits(code, segment, 8 * self.lanes, part)):
                bits = self._unit(code, segment, (40 + UNIT * index) * self.lanes)
                units.append(code.b.or_(low, self._masked(code, bits, bit - 2, 4)))
            scale = code.b.fmul(head[0], self._bytes(code, segment, part * self.lanes, signed=True))
            yield Part(units, scale, None)

    def _scale(self, code: Code, source: Value, index: int) -> Value:
        """Eight bytes hold the low four bits of two scales each, four more the high two of four."""
        b = code.b
        low = b.and_(b.lshr(code.load(BYTE, source, 96 + index % 8), BYTE(index // 8 * 4)), BYTE(15))
        high = b.and_(b.lshr(code.load(BYTE, source, 104 + index % 4), BYTE(index // 4 * 2)), BYTE(3))
        return b.sub(b.or_(low, b.shl(high, BYTE(4))), BYTE(32))


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
        return self._scale_and_least(code, block)

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


class IQ4_XS(Format):  # noqa: N801
    """d, 8 scales of 6 bits, 256 nibbles, each the number of one of 16 values: d * (scale - 32) * VALUES[q].

    A segment is 32 values: byte i of its 16 holds values i and i + 16.
    """

    kind = TensorType.IQ4_XS
    segments, bias, most_unsigned = 8, BIAS, max(TABLE)
    head_units, segment_units = 2, 1 + 16

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        self._copy(code, HALF, source, 0, target, 0, lane)
        for index in range(8):
            segment = self.head_bytes + index * self.segment_bytes
            self._put(code, self._scale(code, source, index), target, segment, lane)
            self._copy_units(code, 4, source, 8 + 16 * index, target, segment + self.lanes, lane)

    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        return (self._half(code, block, 0),)

    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        nibbles = [self._unit(code, segment, (1 + UNIT * index) * self.lanes) for index in range(4)]
        units = [self._looked_up(code, self._masked(code, unit, at, 15), TABLE) for at in (0, 4) for unit in nibbles]
        yield Part(units, code.b.fmul(head[0], self._bytes(code, segment, 0, signed=True)), None)

    def _scale(self, code: Code, source: Value, index: int) -> Value:
        """Two bytes hold the high two bits of each scale, four more the low four of two."""
        b = code.b
        high = b.and_(b.lshr(code.load(BYTE, source, 2 + index // 4), BYTE(index % 4 * 2)), BYTE(3))
        low = b.and_(b.lshr(code.load(BYTE, source, 4 + index // 2), BYTE(index % 2 * 4)), BYTE(15))
        return b.sub(b.or_(low, b.shl(high, BYTE(4))), BYTE(32))
