"""F16 matrices in panels: widened to f32, and multiplied with activations as they are.

The values of a block column are summed apart, even and odd ones, before they are added to the rest: two sums for each
row keep the processor busy, whatever the number of rows, and small parts lose less by rounding.
"""

from eldric.engine.kernels.code import FLOAT, HALF, I64, POINTER, Code, Value, constant, vector
from eldric.engine.kernels.isa import Isa
from eldric.engine.kernels.layout import Layout, prefetch
from eldric.engine.tensor_types import TensorType

_WIDE = 16


class F16(Layout):
    """A block is 32 values; in a panel, a vector of 16-bit numbers for each of them."""

    kind = TensorType.F16
    block = 32
    heights = [*range(1, 9)]  # noqa: RUF012
    tile_row_bytes = 4 * block
    source_bytes = 2 * block

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.block_bytes = 2 * lanes * self.block

    def pack(self, code: Code, source: Value, target: Value, lane: Value) -> None:
        place = code.at(target, code.b.mul(lane, I64(2)))
        for index in range(self.block):
            code.store(code.load(HALF, source, 2 * index), place, 2 * self.lanes * index)

    def write_fill(self, module: Value) -> None:
        code = Code(module, "fill", [POINTER, I64, POINTER, I64, I64])
        row, blocks, tile, rows, number = code.arguments
        wide, step = vector(FLOAT, _WIDE), code.b.mul(rows, I64(self.tile_row_bytes))

        def block(_: Value, carried: list[Value]) -> list[Value]:
            values, place = carried
            for at in range(0, self.tile_row_bytes, 4 * _WIDE):
                code.store(code.load(wide, values, at), place, at)
            return [code.at(values, self.tile_row_bytes), code.at(place, step)]

        code.loop(blocks, [row, code.at(tile, code.b.mul(number, I64(self.tile_row_bytes)))], block)
        code.end()

    def write_tile(self, module: Value, isa: Isa, rows: int) -> None:
        code = Code(module, f"tile_{rows}", [POINTER, I64, POINTER, POINTER, I64])
        panel, blocks, activations, result, stride = code.arguments
        floats = vector(FLOAT, self.lanes)
        zeros = constant(floats, 0.0)

        def block(_: Value, carried: list[Value]) -> list[Value]:
            weights, tile, *totals = carried
            prefetch(code, weights, self.block_bytes)
            sums = [[zeros] * rows, [zeros] * rows]
            for index in range(self.block):
                widened = code.b.fpext(code.load(vector(HALF, self.lanes), weights, 2 * self.lanes * index), floats)
                half = sums[index % 2]
                for row in range(rows):
                    value = code.load(FLOAT, tile, self.tile_row_bytes * row + 4 * index)
                    half[row] = code.fma(widened, code.broadcast(value, self.lanes), half[row])
            added = [code.b.fadd(total, code.b.fadd(even, odd)) for total, even, odd in zip(totals, *sums, strict=True)]
            return [code.at(weights, self.block_bytes), code.at(tile, rows * self.tile_row_bytes), *added]

        _, _, *totals = code.loop(blocks, [panel, activations, *([zeros] * rows)], block)
        for row in range(rows):
            code.store(totals[row], code.at(result, code.b.mul(stride, I64(row))))
        code.end()
