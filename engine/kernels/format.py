"""What all quantized types in panels have in common: packed from the file's blocks, unfolded to bytes for multiplying.

A panel holds `lanes` rows of a matrix, block column by block column. What is one number per row in the file is a vector
with a lane per row here; four consecutive quantized values of a row are the four bytes of a lane, a *unit*. A block in
a panel is a head (the rows' scales) and one or more segments of the same shape; a segment has one integer sum, and one
scale, for every `run` values.

The types: eldric.engine.kernels.formats.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from llvmlite import ir

from eldric.engine.kernels.code import BYTE, FLOAT, HALF, I32, I64, POINTER, Code, Value, constant, vector
from eldric.engine.kernels.isa import Isa
from eldric.engine.kernels.layout import Layout, prefetch

UNIT = 4  # values
_GROUP = 32  # activations of a row that lie together
_WIDE = 16


class Part(NamedTuple):
    """The values of one sum, of all rows of a panel: value = scale * unsigned byte (- bias) - least."""

    units: list[Value]  # vectors of 32-bit lanes, each of 4 unsigned bytes
    scale: Value  # vector of f32
    least: Value | None  # vector of f32, for types with a minimum


class Tile:
    """Where things lie in the activations of `rows` rows, in one block column."""

    def __init__(self, layout: "Format", rows: int) -> None:
        self.rows = rows
        self.sums = layout.runs * rows * 4  # of a segment; its bytes follow
        self.segment_bytes = self.sums + layout.block // layout.segments * rows
        self.head_bytes = 4 * rows
        self.block_bytes = self.head_bytes + layout.segments * self.segment_bytes

    def sum_at(self, run: int, row: int) -> int:
        """Offset in a segment of the sum over a run."""
        return 4 * (run * self.rows + row)

    def unit_at(self, value: int, row: int) -> int:
        """Offset in a segment of the unit that begins with a value."""
        return self.sums + (value // _GROUP * self.rows + row) * _GROUP + value % _GROUP


class Format(Layout):
    """One quantized type in panels. Sizes in bytes are for a number of lanes.

    Activations become bytes as ggml does it (`quantize_row_q8_0` and `quantize_row_q8_K`, ggml-quants.c): over each
    block, scale = largest magnitude / 127.
    """

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
    def head(self, code: Code, block: Value) -> tuple[Value, ...]:
        """What the segments of a block need of its head."""

    @abstractmethod
    def parts(self, code: Code, head: tuple[Value, ...], segment: Value) -> Iterator[Part]:
        """Unfold a segment, `run` values after `run` values."""

    @property
    def source_bytes(self) -> int:
        return self.kind.type_bytes

    @property
    def heights(self) -> list[int]:
        return [*range(1, 9), 16] if self.segments == 1 else [*range(1, 9)]

    @property
    def tile_row_bytes(self) -> int:
        return Tile(self, 1).block_bytes

    def write_fill(self, module: Value) -> None:
        """fill(row of f32, blocks, its tile, rows of the tile, the row's number in it)."""
        code = Code(module, "fill", [POINTER, I64, POINTER, I64, I64])
        row, blocks, tile, rows, number = code.arguments
        b, wide = code.b, vector(FLOAT, _WIDE)
        per_segment = self.block // self.segments

        def block(_: Value, carried: list[Value]) -> list[Value]:
            values, place = carried
            largest = _largest_magnitude(code, values, self.block)
            scale = b.fdiv(largest, FLOAT(127.0))
            if self.block == _GROUP:
                scale = b.fpext(b.fptrunc(scale, HALF), FLOAT)
            code.store(scale, code.at(place, b.mul(number, I64(4))))
            inverse = b.select(b.fcmp_ordered(">", largest, FLOAT(0.0)), b.fdiv(FLOAT(127.0), largest), FLOAT(0.0))
            factor = code.broadcast(inverse, _WIDE)
            place = code.at(place, b.mul(rows, I64(4)))

            def segment(_: Value, carried: list[Value]) -> list[Value]:
                values, sums = carried
                groups = code.at(sums, b.mul(rows, I64(4 * self.runs)))
                for run in range(self.runs):
                    totals = []
                    for at in range(run * self.run, (run + 1) * self.run, _WIDE):
                        scaled = b.fmul(code.load(wide, values, 4 * at), factor)
                        whole = code.call("llvm.lrint.v16i32.v16f32", vector(I32, _WIDE), scaled)
                        totals.append(whole)
                        index = b.add(b.mul(rows, I64(at // _GROUP)), number)
                        group = code.at(groups, b.mul(index, I64(_GROUP)))
                        code.store(b.trunc(whole, vector(BYTE, _WIDE)), group, at % _GROUP)
                    summed = totals[0] if len(totals) == 1 else b.add(*totals)
                    total = code.call("llvm.vector.reduce.add.v16i32", I32, summed)
                    total = b.sitofp(b.neg(total), FLOAT) if self.has_least else b.mul(total, I32(-self.bias))
                    index = b.add(b.mul(rows, I64(run)), number)
                    code.store(total, code.at(sums, b.mul(index, I64(4))))
                following = code.at(groups, b.mul(rows, I64(per_segment)))
                return [code.at(values, 4 * per_segment), following]

            return code.loop(self.segments, [values, place], segment)

        code.loop(blocks, [row, tile], block)
        code.end()

    def write_tile(self, module: Value, isa: Isa, rows: int) -> None:
        """tile_N(panel, blocks, tile of N rows, result, bytes between its rows): lanes of N rows of the result."""
        code = Code(module, f"tile_{rows}", [POINTER, I64, POINTER, POINTER, I64])
        panel, blocks, activations, result, stride = code.arguments
        shape, lanes = Tile(self, rows), self.lanes
        zeros = constant(self.floats, 0.0)

        def block(_: Value, carried: list[Value]) -> list[Value]:
            weights, tile, *totals = carried
            prefetch(code, weights, self.block_bytes)
            head = self.head(code, weights)

            def segment(_: Value, carried: list[Value]) -> list[Value]:
                place, bytes_at, *sums = carried
                for run, part in enumerate(self.parts(code, head, place)):
                    for row in range(rows):
                        sums[row] = self._add_run(code, isa, shape, part, bytes_at, run, row, sums[row])
                return [code.at(place, self.segment_bytes), code.at(bytes_at, shape.segment_bytes), *sums]

            places = [code.at(weights, self.head_bytes), code.at(tile, shape.head_bytes)]
            if self.segments == 1:
                weights_next, tile_next, *sums = segment(I64(0), [*places, *([zeros] * rows)])
            else:
                weights_next, tile_next, *sums = code.loop(self.segments, [*places, *([zeros] * rows)], segment)
            for row in range(rows):
                scale = code.broadcast(code.load(FLOAT, tile, 4 * row), lanes)
                totals[row] = code.fma(sums[row], scale, totals[row])
            return [weights_next, tile_next, *totals]

        _, _, *totals = code.loop(blocks, [panel, activations, *([zeros] * rows)], block)
        for row in range(rows):
            code.store(totals[row], code.at(result, code.b.mul(stride, I64(row))))
        code.end()

    def _add_run(
        self, code: Code, isa: Isa, shape: Tile, part: Part, segment: Value, run: int, row: int, total: Value
    ) -> Value:
        """total + what a run of weights and of one row's activations give, but for the activations' scale."""
        sum_at, lanes = shape.sum_at(run, row), self.lanes
        whole = constant(self.ints, 0)
        if self.bias:
            whole = code.broadcast(code.load(I32, segment, sum_at), lanes)
        for index, unit in enumerate(part.units):
            four = code.load(I32, segment, shape.unit_at(run * self.run + UNIT * index, row))
            whole = isa.multiply_add(code, whole, unit, code.broadcast(four, lanes), self.most_unsigned)
        total = code.fma(code.b.sitofp(whole, self.floats), part.scale, total)
        if part.least is not None:
            total = code.fma(part.least, code.broadcast(code.load(FLOAT, segment, sum_at), lanes), total)
        return total

    def _half(self, code: Code, block: Value, offset: int) -> Value:
        """A number per row, kept in 16 bits."""
        return code.b.fpext(code.load(vector(HALF, self.lanes), block, offset), self.floats)

    def _scale_and_least(self, code: Code, block: Value) -> tuple[Value, Value]:
        """Two numbers per row that begin a block."""
        return self._half(code, block, 0), self._half(code, block, 2 * self.lanes)

    def _copy_scale_and_minimum(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        """Two numbers that begin the file's block, the second one to be added: as what is taken off."""
        self._copy(code, HALF, source, 0, target, 0, lane)
        self._put(code, code.b.fneg(code.load(HALF, source, 2)), target, 2 * self.lanes, lane)

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


def _largest_magnitude(code: Code, values: Value, count: int) -> Value:
    """Of so many f32, NaN if one is: without their signs, their bits are ordered as the numbers are, and NaN above."""
    bits = vector(I32, _WIDE)
    most = constant(bits, 0)
    for at in range(0, 4 * count, 4 * _WIDE):
        unsigned = code.b.and_(code.load(bits, values, at), constant(bits, 0x7FFFFFFF))
        most = code.call("llvm.umax.v16i32", bits, most, unsigned)
    return code.b.bitcast(code.call("llvm.vector.reduce.umax.v16i32", I32, most), FLOAT)
