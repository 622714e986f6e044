"""Writes the functions of one format: `pack`, which makes panels, and `product`, which multiplies with them.

`product` is a custom operation of ggml. It turns rows of activations into signed bytes, in tiles: of up to 16
rows, block column by block column, so that everything a panel's block is multiplied with lies together. Then each panel
meets each tile, and stays in the cache meanwhile.

Activations become bytes as ggml does it (`quantize_row_q8_0` and `quantize_row_q8_K`, ggml-quants.c): over each block,
scale = largest magnitude / 127.
"""

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels.code import (
    BYTE,
    FLOAT,
    HALF,
    I32,
    I64,
    POINTER,
    VOID,
    Code,
    Value,
    constant,
    vector,
)
from eldric.engine.kernels.format import UNIT, Format, Part
from eldric.engine.kernels.isa import Isa

PASS_ROWS = 64  # so many rows are in scratch memory at once
_PREFETCH_BYTES = 3072  # how far ahead; measured with 1 to 8 rows
_SHARED_ROWS = 8  # from so many on, each thread fills a part of the tiles, and all wait for each other
_GROUP = 32  # activations of a row that lie together
_WIDE = 16


class Task(NamedTuple):
    """Offsets in what `product` gets as its user data: 64-bit words."""

    panels: int = 0  # address of the packed matrix
    panel_count: int = 8
    blocks: int = 16  # of a row
    scratch: int = 24  # address of the first thread's scratch memory
    scratch_bytes: int = 32  # of one thread
    waiting: int = 40  # threads at the barrier
    meetings: int = 48  # how often all have been there


TASK = Task()


class Tile:
    """Where things lie in the activations of `rows` rows, in one block column."""

    def __init__(self, layout: Format, rows: int) -> None:
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


def row_bytes(layout: Format) -> int:
    """Scratch bytes of one row in one block column."""
    return Tile(layout, 1).block_bytes


def row_counts(layout: Format) -> list[int]:
    """Heights of tiles. More rows share the work of unfolding, until the registers are full."""
    return [*range(1, 9), 16] if layout.segments == 1 else [*range(1, 9)]


def write_module(layout: Format, isa: Isa) -> str:
    """LLVM IR of `pack` and `product`, for a format with the ISA's number of lanes."""
    module = ir.Module(name=layout.kind.name)
    _write_pack(module, layout)
    _write_quantize(module, layout)
    for rows in row_counts(layout):
        _write_tile(module, layout, isa, rows)
    _write_meet(module)
    _write_product(module, layout)
    return str(module)


def _write_pack(module: Value, layout: Format) -> None:
    """pack(source, row bytes, blocks of a row, panels, target)."""
    code = Code(module, "pack", [POINTER, I64, I64, I64, POINTER], exported=True)
    source, stride, blocks, panels, target = code.arguments
    block_bytes = layout.kind.type_bytes

    def panel(index: Value, carried: list[Value]) -> list[Value]:
        first = code.at(source, code.b.mul(index, code.b.mul(stride, I64(layout.lanes))))

        def block(column: Value, places: list[Value]) -> list[Value]:
            at = code.at(first, code.b.mul(column, I64(block_bytes)))

            def lane(row: Value, _: list[Value]) -> list[Value]:
                layout.pack(code, code.at(at, code.b.mul(row, stride)), places[0], row)
                return []

            code.loop(layout.lanes, [], lane)
            return [code.at(places[0], layout.block_bytes)]

        return code.loop(blocks, carried, block)

    code.loop(panels, [target], panel)
    code.end()


def _write_quantize(module: Value, layout: Format) -> None:
    """quantize(row of f32, blocks, its tile, rows of the tile, the row's number in it)."""
    code = Code(module, "quantize", [POINTER, I64, POINTER, I64, I64])
    row, blocks, tile, rows, number = code.arguments
    b, wide = code.b, vector(FLOAT, _WIDE)
    per_segment = layout.block // layout.segments

    def block(_: Value, carried: list[Value]) -> list[Value]:
        values, place = carried
        largest = _largest_magnitude(code, values, layout.block)
        scale = b.fdiv(largest, FLOAT(127.0))
        if layout.block == _GROUP:
            scale = b.fpext(b.fptrunc(scale, HALF), FLOAT)
        code.store(scale, code.at(place, b.mul(number, I64(4))))
        inverse = b.select(b.fcmp_ordered(">", largest, FLOAT(0.0)), b.fdiv(FLOAT(127.0), largest), FLOAT(0.0))
        factor = code.broadcast(inverse, _WIDE)
        place = code.at(place, b.mul(rows, I64(4)))

        def segment(_: Value, carried: list[Value]) -> list[Value]:
            values, sums = carried
            groups = code.at(sums, b.mul(rows, I64(4 * layout.runs)))
            for run in range(layout.runs):
                totals = []
                for at in range(run * layout.run, (run + 1) * layout.run, _WIDE):
                    scaled = b.fmul(code.load(wide, values, 4 * at), factor)
                    whole = code.call("llvm.lrint.v16i32.v16f32", vector(I32, _WIDE), scaled)
                    totals.append(whole)
                    index = b.add(b.mul(rows, I64(at // _GROUP)), number)
                    group = code.at(groups, b.mul(index, I64(_GROUP)))
                    code.store(b.trunc(whole, vector(BYTE, _WIDE)), group, at % _GROUP)
                summed = totals[0] if len(totals) == 1 else b.add(*totals)
                total = code.call("llvm.vector.reduce.add.v16i32", I32, summed)
                total = b.sitofp(b.neg(total), FLOAT) if layout.has_least else b.mul(total, I32(-layout.bias))
                index = b.add(b.mul(rows, I64(run)), number)
                code.store(total, code.at(sums, b.mul(index, I64(4))))
            following = code.at(groups, b.mul(rows, I64(per_segment)))
            return [code.at(values, 4 * per_segment), following]

        return code.loop(layout.segments, [values, place], segment)

    code.loop(blocks, [row, tile], block)
    code.end()


def _largest_magnitude(code: Code, values: Value, count: int) -> Value:
    """Of so many f32, NaN if one is: without their signs, their bits are ordered as the numbers are, and NaN above."""
    bits = vector(I32, _WIDE)
    most = constant(bits, 0)
    for at in range(0, 4 * count, 4 * _WIDE):
        unsigned = code.b.and_(code.load(bits, values, at), constant(bits, 0x7FFFFFFF))
        most = code.call("llvm.umax.v16i32", bits, most, unsigned)
    return code.b.bitcast(code.call("llvm.vector.reduce.umax.v16i32", I32, most), FLOAT)


def _write_tile(module: Value, layout: Format, isa: Isa, rows: int) -> None:
    """tile_N(panel, blocks, tile of N rows, result, bytes between its rows): lanes of N rows of the result."""
    code = Code(module, f"tile_{rows}", [POINTER, I64, POINTER, POINTER, I64])
    panel, blocks, activations, result, stride = code.arguments
    shape, lanes = Tile(layout, rows), layout.lanes
    zeros = constant(layout.floats, 0.0)

    def block(_: Value, carried: list[Value]) -> list[Value]:
        weights, tile, *totals = carried
        for ahead in range(0, layout.block_bytes, 64):
            code.prefetch(weights, _PREFETCH_BYTES + ahead)
        head = layout.head(code, weights)

        def segment(_: Value, carried: list[Value]) -> list[Value]:
            place, bytes_at, *sums = carried
            for run, part in enumerate(layout.parts(code, head, place)):
                for row in range(rows):
                    sums[row] = _add_run(code, layout, isa, shape, part, bytes_at, run, row, sums[row])
            return [code.at(place, layout.segment_bytes), code.at(bytes_at, shape.segment_bytes), *sums]

        places = [code.at(weights, layout.head_bytes), code.at(tile, shape.head_bytes)]
        if layout.segments == 1:
            weights_next, tile_next, *sums = segment(I64(0), [*places, *([zeros] * rows)])
        else:
            weights_next, tile_next, *sums = code.loop(layout.segments, [*places, *([zeros] * rows)], segment)
        for row in range(rows):
            scale = code.broadcast(code.load(FLOAT, tile, 4 * row), lanes)
            totals[row] = code.fma(sums[row], scale, totals[row])
        return [weights_next, tile_next, *totals]

    _, _, *totals = code.loop(blocks, [panel, activations, *([zeros] * rows)], block)
    for row in range(rows):
        code.store(totals[row], code.at(result, code.b.mul(stride, I64(row))))
    code.end()


def _add_run(
    code: Code, layout: Format, isa: Isa, shape: Tile, part: Part, segment: Value, run: int, row: int, total: Value
) -> Value:
    """total + what a run of weights and of one row's activations give, but for the activations' scale."""
    sum_at, lanes = shape.sum_at(run, row), layout.lanes
    whole = constant(layout.ints, 0)
    if layout.bias:
        whole = code.broadcast(code.load(I32, segment, sum_at), lanes)
    for index, unit in enumerate(part.units):
        four = code.load(I32, segment, shape.unit_at(run * layout.run + UNIT * index, row))
        whole = isa.multiply_add(code, whole, unit, code.broadcast(four, lanes), layout.most_unsigned)
    total = code.fma(code.b.sitofp(whole, layout.floats), part.scale, total)
    if part.least is not None:
        total = code.fma(part.least, code.broadcast(code.load(FLOAT, segment, sum_at), lanes), total)
    return total


def _write_product(module: Value, layout: Format) -> None:
    """product(result tensor, thread, threads, task): what ggml_custom_4d calls in every thread."""
    code = Code(module, "product", [POINTER, I32, I32, POINTER], exported=True)
    result, thread, threads, task = code.arguments
    b = code.b
    source = code.load(POINTER, result, Tensor.src.offset)
    blocks, panel_count = code.load(I64, task, TASK.blocks), code.load(I64, task, TASK.panel_count)
    thread, threads = b.zext(thread, I64), b.zext(threads, I64)
    rows = code.load(I64, result, Tensor.ne.offset + 8)
    is_shared = b.and_(b.icmp_unsigned(">", threads, I64(1)), b.icmp_unsigned(">=", rows, I64(_SHARED_ROWS)))
    first = b.udiv(b.mul(panel_count, thread), threads)
    count = b.sub(b.udiv(b.mul(panel_count, b.add(thread, I64(1))), threads), first)
    own_scratch = b.mul(b.select(is_shared, I64(0), thread), code.load(I64, task, TASK.scratch_bytes))
    scratch = code.at(code.load(POINTER, task, TASK.scratch), own_scratch)
    panel_bytes = b.mul(blocks, I64(layout.block_bytes))
    panels = code.at(code.load(POINTER, task, TASK.panels), b.mul(first, panel_bytes))
    stride, source_stride = (code.load(I64, each, Tensor.nb.offset + 8) for each in (result, source))
    target = code.at(code.load(POINTER, result, Tensor.data.offset), b.mul(first, I64(4 * layout.lanes)))
    tiles = _Tiles(code, layout, blocks)

    def one_pass(index: Value, carried: list[Value]) -> list[Value]:
        values, target = carried
        left = b.sub(rows, b.mul(index, I64(PASS_ROWS)))
        count_of_rows = b.select(b.icmp_unsigned("<", left, I64(PASS_ROWS)), left, I64(PASS_ROWS))
        share = _Share(thread, b.select(is_shared, threads, I64(1)))
        tiles.each(count_of_rows, scratch, lambda *tile: tiles.fill(values, source_stride, share, *tile))
        with b.if_then(is_shared):
            code.call("meet", VOID, task, threads)

        def panel(_: Value, carried: list[Value]) -> list[Value]:
            weights, column = carried
            tiles.each(count_of_rows, scratch, lambda *tile: tiles.multiply(weights, column, stride, *tile))
            return [code.at(weights, panel_bytes), code.at(column, 4 * layout.lanes)]

        with b.if_then(b.icmp_unsigned(">", count, I64(0))):
            code.loop(count, [panels, target], panel)
        with b.if_then(b.and_(is_shared, b.icmp_unsigned(">", left, I64(PASS_ROWS)))):
            code.call("meet", VOID, task, threads)  # the next pass takes the scratch memory
        return [
            code.at(each, b.mul(step, I64(PASS_ROWS))) for each, step in ((values, source_stride), (target, stride))
        ]

    with b.if_then(b.icmp_unsigned(">", rows, I64(0))):
        passes = b.udiv(b.add(rows, I64(PASS_ROWS - 1)), I64(PASS_ROWS))
        code.loop(passes, [code.load(POINTER, source, Tensor.data.offset), target], one_pass)
    code.end()


def _write_meet(module: Value) -> None:
    """meet(task, threads): returns when all threads have called it. They run at once: ggml has none wait for another
    within an operation."""
    code = Code(module, "meet", [POINTER, I64])
    task, threads = code.arguments
    b = code.b
    waiting, meetings = code.at(task, TASK.waiting), code.at(task, TASK.meetings)
    before = b.load_atomic(meetings, "acquire", 8, typ=I64)
    others = b.atomic_rmw("add", waiting, I64(1), "acq_rel")
    with b.if_else(b.icmp_unsigned("==", b.add(others, I64(1)), threads)) as (last, early):
        with last:
            b.atomic_rmw("xchg", waiting, I64(0), "monotonic")
            b.atomic_rmw("add", meetings, I64(1), "release")
        with early:
            look, done = code.function.append_basic_block(), code.function.append_basic_block()
            b.branch(look)
            b.position_at_end(look)
            code.call("llvm.x86.sse2.pause", VOID)
            now = b.load_atomic(meetings, "acquire", 8, typ=I64)
            b.cbranch(b.icmp_unsigned("==", now, before), look, done)
            b.position_at_end(done)
    code.end()


class _Share(NamedTuple):
    """Which rows a thread turns into bytes: every `of`-th."""

    thread: Value
    of: Value


class _Tiles:
    """How rows are divided into tiles: as many of the highest as fit, and one of each lower height that is needed."""

    def __init__(self, code: Code, layout: Format, blocks: Value) -> None:
        self._code, self._layout, self._blocks = code, layout, blocks
        self._heights = row_counts(layout)

    def each(self, rows: Value, scratch: Value, body: Callable[[Value, Value, Value], None]) -> None:
        """body(tile, its first row, its height) for all tiles of so many rows."""
        code, b = self._code, self._code.b
        full = [height for height in self._heights if height % 8 == 0]
        count, rest = I64(0), rows
        for height in reversed(full):
            count, rest = b.add(count, b.udiv(rest, I64(height))), b.urem(rest, I64(height))
        count = b.add(count, b.zext(b.icmp_unsigned(">", rest, I64(0)), I64))
        bytes_of_row = b.mul(self._blocks, I64(row_bytes(self._layout)))

        def tile(_: Value, carried: list[Value]) -> list[Value]:
            place, first = carried
            height = b.sub(rows, first)
            for most in full:
                height = b.select(b.icmp_unsigned(">=", b.sub(rows, first), I64(most)), I64(most), height)
            body(place, first, height)
            return [code.at(place, b.mul(height, bytes_of_row)), b.add(first, height)]

        code.loop(count, [scratch, I64(0)], tile)

    def fill(self, values: Value, stride: Value, share: _Share, tile: Value, first: Value, height: Value) -> None:
        """Turn a thread's share of a tile's rows into bytes."""
        code, b = self._code, self._code.b

        def row(number: Value, _: list[Value]) -> list[Value]:
            index = b.add(first, number)
            is_own = b.icmp_unsigned("==", b.urem(index, share.of), b.urem(share.thread, share.of))
            with b.if_then(is_own):
                source = code.at(values, b.mul(stride, index))
                code.call("quantize", VOID, source, self._blocks, tile, height, number)
            return []

        code.loop(height, [], row)

    def multiply(self, panel: Value, column: Value, stride: Value, tile: Value, first: Value, height: Value) -> None:
        """Multiply a panel with a tile. column: the result's place for the panel in row 0."""
        code, b = self._code, self._code.b
        result = code.at(column, b.mul(stride, first))
        after = code.function.append_basic_block()
        choice = b.switch(height, after)
        for rows in self._heights:
            case = code.function.append_basic_block()
            choice.add_case(I64(rows), case)
            b.position_at_end(case)
            code.call(f"tile_{rows}", VOID, panel, self._blocks, tile, result, stride)
            b.branch(after)
        b.position_at_end(after)
