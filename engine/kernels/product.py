"""Writes the functions of one layout: `pack`, which makes panels, and `product`, which multiplies with them.

`product` is a custom operation of ggml. It brings rows of activations into *tiles*: of up to 8 or 16 rows, block column
by block column, so that everything a panel's block is multiplied with lies together. Then each panel meets each tile,
and stays in the cache meanwhile.
"""

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels.code import (
    I32,
    I64,
    POINTER,
    VOID,
    Code,
    Value,
)
from eldric.engine.kernels.isa import Isa
from eldric.engine.kernels.layout import Layout

PASS_ROWS = 64  # so many rows are in scratch memory at once
_SHARED_ROWS = 8  # from so many on, each thread fills a part of the tiles, and all wait for each other


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


def write_module(layout: Layout, isa: Isa) -> str:
    """LLVM IR of `pack` and `product`, for a format with the ISA's number of lanes."""
    module = ir.Module(name=layout.kind.name)
    _write_pack(module, layout)
    layout.write_fill(module)
    for rows in layout.heights:
        layout.write_tile(module, isa, rows)
    _write_meet(module)
    _write_product(module, layout)
    return str(module)


def _write_pack(module: Value, layout: Layout) -> None:
    """pack(source, row bytes, blocks of a row, panels, target)."""
    code = Code(module, "pack", [POINTER, I64, I64, I64, POINTER], exported=True)
    source, stride, blocks, panels, target = code.arguments

    def panel(index: Value, carried: list[Value]) -> list[Value]:
        first = code.at(source, code.b.mul(index, code.b.mul(stride, I64(layout.lanes))))

        def block(column: Value, places: list[Value]) -> list[Value]:
            at = code.at(first, code.b.mul(column, I64(layout.source_bytes)))

            def lane(row: Value, _: list[Value]) -> list[Value]:
                layout.pack(code, code.at(at, code.b.mul(row, stride)), places[0], row)
                return []

            code.loop(layout.lanes, [], lane)
            return [code.at(places[0], layout.block_bytes)]

        return code.loop(blocks, carried, block)

    code.loop(panels, [target], panel)
    code.end()


def _write_product(module: Value, layout: Layout) -> None:
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
    """Which rows a thread brings into tiles: every `of`-th."""

    thread: Value
    of: Value


class _Tiles:
    """How rows are divided into tiles: as many of the highest as fit, and one of each lower height that is needed."""

    def __init__(self, code: Code, layout: Layout, blocks: Value) -> None:
        self._code, self._layout, self._blocks = code, layout, blocks
        self._heights = layout.heights

    def each(self, rows: Value, scratch: Value, body: Callable[[Value, Value, Value], None]) -> None:
        """body(tile, its first row, its height) for all tiles of so many rows."""
        code, b = self._code, self._code.b
        full = [height for height in self._heights if height % 8 == 0]
        count, rest = I64(0), rows
        for height in reversed(full):
            count, rest = b.add(count, b.udiv(rest, I64(height))), b.urem(rest, I64(height))
        count = b.add(count, b.zext(b.icmp_unsigned(">", rest, I64(0)), I64))
        bytes_of_row = b.mul(self._blocks, I64(self._layout.tile_row_bytes))

        def tile(_: Value, carried: list[Value]) -> list[Value]:
            place, first = carried
            height = b.sub(rows, first)
            for most in full:
                height = b.select(b.icmp_unsigned(">=", b.sub(rows, first), I64(most)), I64(most), height)
            body(place, first, height)
            return [code.at(place, b.mul(height, bytes_of_row)), b.add(first, height)]

        code.loop(count, [scratch, I64(0)], tile)

    def fill(self, values: Value, stride: Value, share: _Share, tile: Value, first: Value, height: Value) -> None:
        """Bring a thread's share of a tile's rows in."""
        code, b = self._code, self._code.b

        def row(number: Value, _: list[Value]) -> list[Value]:
            index = b.add(first, number)
            is_own = b.icmp_unsigned("==", b.urem(index, share.of), b.urem(share.thread, share.of))
            with b.if_then(is_own):
                source = code.at(values, b.mul(stride, index))
                code.call("fill", VOID, source, self._blocks, tile, height, number)
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
