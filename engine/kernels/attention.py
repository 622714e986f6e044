"""Writes `attend`: what each query of a run gets from the keys and values of its slot, up to its own position.

Keys are taken in blocks of BLOCK cells that begin at multiples of it, and the softmax goes along from block to block
(Milakov, Gimelshein: "Online normalizer calculation for softmax", 2018; Dao et al.: "FlashAttention", 2022). So the
order of all sums follows from the position alone: a query gets the same bits in a chunk of any length and in a decode
step, beside any others, on any vector width and thread.

A block of keys is turned into f32 and transposed, which makes lanes of cells; then all queries that share these keys
meet it: the query heads of a group, of several rows. They go in tiles whose sums fit in registers.
"""

import math
from typing import NamedTuple

from llvmlite import ir

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels.code import FLOAT, HALF, I32, I64, POINTER, VOID, Code, Value, constant, vector
from eldric.engine.kernels.isa import Isa

BLOCK = 64  # cells
_QUERIES = 64  # that meet a block together
_MOST_TILE = 4
_LANES = 16  # of every vector here, whatever the processor's are: they tell the order of sums
_VECTORS = BLOCK // _LANES
_LOG2_E = 1.4426950408889634
#: 2 ** f for |f| <= 1/2, the Taylor series of exp(f log 2): the first term left out is below 2e-8.
_EXP2 = tuple(math.log(2.0) ** power / math.factorial(power) for power in range(8))
_LEAST_EXPONENT = -126.0

_WIDE, _INTS = vector(FLOAT, _LANES), vector(I32, _LANES)


class Task(NamedTuple):
    """Offsets in what `attend` gets as its user data: 64-bit words."""

    scratch: int = 0  # address of the first thread's scratch memory
    scratch_bytes: int = 8  # of one thread


TASK = Task()


class Scratch(NamedTuple):
    """Offsets in a thread's scratch memory, for a head dimension."""

    keys: int  # [head_dim, BLOCK] f32
    values: int  # [BLOCK, head_dim] f32
    queries: int  # tiles of [head_dim, queries of a tile] f32
    sums: int  # [queries, head_dim] f32
    weights: int  # of a tile: [queries of a tile, BLOCK] f32
    largest: int  # [queries] f32: the largest score so far
    totals: int  # [queries, lanes] f32: of the weights so far
    limits: int  # [queries] i64: cells that a query attends to
    end: int


def scratch(head_dim: int) -> Scratch:
    rows = 4 * head_dim
    blocks, queries = [BLOCK * rows] * 2, [_QUERIES * rows] * 2
    sizes = [*blocks, *queries, 4 * BLOCK * _MOST_TILE, 4 * _QUERIES, 4 * _LANES * _QUERIES, 8 * _QUERIES]
    offsets = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return Scratch(*offsets)


def write_module(head_dim: int, is_half: bool, isa: Isa) -> str:
    """LLVM IR of attend(result tensor, thread, threads, task), a custom operation of ggml.

    Sources, in ggml's order of dimensions: queries [head_dim, rows, heads] of f32, keys and values
    [head_dim, cells, key heads] of f16 or f32, positions [rows] of i32. Result: [head_dim, heads, rows] of f32.
    head_dim is a multiple of 16.
    """
    module = ir.Module(name="attention")
    plan = _Plan(head_dim, is_half, _MOST_TILE if isa.lanes == _LANES else 2)
    _write_bring_keys(module, plan)
    _write_bring_values(module, plan)
    _write_tile(module, plan)
    _write_attend(module, plan)
    return str(module)


class _Plan:
    """The sizes that a module is written for."""

    def __init__(self, head_dim: int, is_half: bool, tile: int) -> None:
        self.head_dim, self.is_half, self.tile = head_dim, is_half, tile
        self.scratch = scratch(head_dim)
        vectors = head_dim // _LANES
        self.group = next(size for size in (tile, 2, 1) if vectors % size == 0)  # vectors of a value's sums at once
        self.cell_bytes = head_dim * (2 if is_half else 4)

    def load(self, code: Code, cell: Value, dim: int | Value) -> Value:
        """16 dimensions of a key or value as f32."""
        size = 2 if self.is_half else 4
        offset = dim * size if isinstance(dim, int) else code.b.mul(dim, I64(size))
        if self.is_half:
            return code.b.fpext(code.load(vector(HALF, _LANES), cell, offset), _WIDE)
        return code.load(_WIDE, cell, offset)


def _exp2(code: Code, x: Value) -> Value:
    """2 ** x for 16 values that are not positive. Below 2 ** -126 it gives 2 ** -126."""
    b = code.b
    least = constant(_WIDE, _LEAST_EXPONENT)
    x = b.select(b.fcmp_ordered("<", x, least), least, x)  # leaves NaN as it is
    whole = code.call("llvm.rint.v16f32", _WIDE, x)
    rest = b.fsub(x, whole)
    power = constant(_WIDE, _EXP2[-1])
    for factor in reversed(_EXP2[:-1]):
        power = code.fma(power, rest, constant(_WIDE, factor))
    exponent = code.call("llvm.lrint.v16i32.v16f32", _INTS, whole)
    shifted = b.shl(b.add(exponent, constant(_INTS, 127)), constant(_INTS, 23))
    return b.fmul(power, b.bitcast(shifted, _WIDE))


def _transposed(code: Code, rows: list[Value]) -> list[Value]:
    """16 vectors of 16: halves, then quarters, and so on, change places."""
    for half in (8, 4, 2, 1):
        upper = [lane if not lane & half else 16 + lane - half for lane in range(_LANES)]
        lower = [lane + half if not lane & half else 16 + lane for lane in range(_LANES)]
        for index in (index for index in range(_LANES) if not index & half):
            first, second = rows[index], rows[index + half]
            for place, mask in ((index, upper), (index + half, lower)):
                rows[place] = code.b.shuffle_vector(first, second, ir.Constant(_INTS, mask))
    return rows


def _write_bring_keys(module: Value, plan: _Plan) -> None:
    """bring_keys(cells, bytes from one to the next, how many, target): a block as [head_dim, BLOCK].

    Lanes behind the last cell get that cell's again; they are never used.
    """
    code = Code(module, "bring_keys", [POINTER, I64, I64, POINTER])
    cells, stride, count, target = code.arguments
    b, last = code.b, code.b.sub(count, I64(1))

    def some(index: Value, _: list[Value]) -> list[Value]:
        first = b.mul(index, I64(_LANES))

        def dims(part: Value, _: list[Value]) -> list[Value]:
            dim, rows = b.mul(part, I64(_LANES)), []
            for lane in range(_LANES):
                cell = b.add(first, I64(lane))
                cell = b.select(b.icmp_unsigned("<", cell, last), cell, last)
                rows.append(plan.load(code, code.at(cells, b.mul(cell, stride)), dim))
            place = code.at(target, b.add(b.mul(dim, I64(4 * BLOCK)), b.mul(first, I64(4))))
            for lane, row in enumerate(_transposed(code, rows)):
                code.store(row, place, 4 * BLOCK * lane)
            return []

        code.loop(plan.head_dim // _LANES, [], dims)
        return []

    code.loop(b.udiv(b.add(count, I64(_LANES - 1)), I64(_LANES)), [], some)
    code.end()


def _write_bring_values(module: Value, plan: _Plan) -> None:
    """bring_values(cells, bytes from one to the next, how many, target): as [cells, head_dim]."""
    code = Code(module, "bring_values", [POINTER, I64, I64, POINTER])
    cells, stride, count, target = code.arguments

    def cell(index: Value, _: list[Value]) -> list[Value]:
        source = code.at(cells, code.b.mul(index, stride))
        place = code.at(target, code.b.mul(index, I64(4 * plan.head_dim)))
        for dim in range(0, plan.head_dim, _LANES):
            code.store(plan.load(code, source, dim), place, 4 * dim)
        return []

    code.loop(count, [], cell)
    code.end()


def _write_tile(module: Value, plan: _Plan) -> None:
    """tile(scratch, its first query, first cell of the block, cells of the block): a tile meets a block."""
    code = Code(module, "tile", [POINTER, I64, I64, I64])
    base, first, start, count = code.arguments
    b, places, size = code.b, plan.scratch, plan.tile
    queries = code.at(base, b.add(b.mul(first, I64(4 * plan.head_dim)), I64(places.queries)))
    keys = code.at(base, places.keys)

    def dim(index: Value, scores: list[Value]) -> list[Value]:
        column = code.at(keys, b.mul(index, I64(4 * BLOCK)))
        vectors = [code.load(_WIDE, column, 4 * _LANES * part) for part in range(_VECTORS)]
        row = code.at(queries, b.mul(index, I64(4 * size)))
        for query in range(size):
            value = code.broadcast(code.load(FLOAT, row, 4 * query), _LANES)
            for part in range(_VECTORS):
                place = query * _VECTORS + part
                scores[place] = code.fma(vectors[part], value, scores[place])
        return scores

    scores = code.loop(plan.head_dim, [constant(_WIDE, 0.0)] * (size * _VECTORS), dim)
    factors = [
        _weigh(code, plan, base, b.add(first, I64(query)), start, scores[query * _VECTORS :][:_VECTORS], query)
        for query in range(size)
    ]
    _add_values(code, plan, base, first, count, factors)
    code.end()


def _weigh(code: Code, plan: _Plan, base: Value, query: Value, start: Value, scores: list[Value], number: int) -> Value:
    """Write the weights of a query's scores, [BLOCK]; return what its earlier sums are multiplied with.

    Scores are logarithms to base 2, as the queries were multiplied with log2(e) among others.
    """
    b, places = code.b, plan.scratch
    limit = code.load(I64, code.at(base, b.mul(query, I64(8))), places.limits)
    own = ir.Constant(_INTS, list(range(_LANES)))
    left = code.broadcast(b.trunc(b.sub(limit, start), I32), _LANES)
    seen = [b.icmp_signed("<", b.add(own, constant(_INTS, _LANES * part)), left) for part in range(_VECTORS)]
    nothing = constant(_WIDE, float("-inf"))
    scores = [b.select(mask, score, nothing) for mask, score in zip(seen, scores, strict=True)]
    largest_at = code.at(base, b.mul(query, I64(4)))
    before = code.load(FLOAT, largest_at, places.largest)
    most = code.broadcast(before, _LANES)
    for score in scores:
        most = b.select(b.fcmp_ordered(">", score, most), score, most)
    for half in (8, 4, 2, 1):
        turned = ir.Constant(_INTS, [lane ^ half for lane in range(_LANES)])
        other = b.shuffle_vector(most, most, turned)
        most = b.select(b.fcmp_ordered(">", other, most), other, most)
    code.store(b.extract_element(most, I32(0)), largest_at, places.largest)
    factor = _exp2(code, b.fsub(code.broadcast(before, _LANES), most))
    totals_at = code.at(base, b.mul(query, I64(4 * _LANES)))
    total = b.fmul(code.load(_WIDE, totals_at, places.totals), factor)
    for part, (mask, score) in enumerate(zip(seen, scores, strict=True)):
        weight = b.select(mask, _exp2(code, b.fsub(score, most)), constant(_WIDE, 0.0))
        total = b.fadd(total, weight)
        code.store(weight, base, places.weights + 4 * (number * BLOCK + part * _LANES))
    code.store(total, totals_at, places.totals)
    return factor


def _add_values(code: Code, plan: _Plan, base: Value, first: Value, count: Value, factors: list[Value]) -> None:
    """Add the block's values, by their weights, to the sums of a tile's queries."""
    b, places = code.b, plan.scratch
    for dim in range(0, plan.head_dim, _LANES * plan.group):
        at = [4 * (dim + _LANES * part) for part in range(plan.group)]
        rows = [code.at(base, b.mul(b.add(first, I64(query)), I64(4 * plan.head_dim))) for query in range(plan.tile)]
        sums = [
            b.fmul(code.load(_WIDE, row, places.sums + offset), factor)
            for row, factor in zip(rows, factors, strict=True)
            for offset in at
        ]

        def cell(index: Value, sums: list[Value], at: list[int] = at) -> list[Value]:
            value = code.at(base, b.mul(index, I64(4 * plan.head_dim)))
            vectors = [code.load(_WIDE, value, places.values + offset) for offset in at]
            weights = code.at(base, b.mul(index, I64(4)))
            for query in range(plan.tile):
                weight = code.broadcast(code.load(FLOAT, weights, places.weights + 4 * BLOCK * query), _LANES)
                for part in range(plan.group):
                    place = query * plan.group + part
                    sums[place] = code.fma(vectors[part], weight, sums[place])
            return sums

        sums = code.loop(count, sums, cell)
        for query, row in enumerate(rows):
            for part, offset in enumerate(at):
                code.store(sums[query * plan.group + part], row, places.sums + offset)


class _Operands:
    """What `attend` reads of the operation's tensors."""

    def __init__(self, code: Code, result: Value) -> None:
        def number(tensor: Value, offset: int) -> Value:
            return code.load(I64, tensor, offset)

        ne, nb, data = Tensor.ne.offset, Tensor.nb.offset, Tensor.data.offset
        sources = [code.load(POINTER, result, Tensor.src.offset + 8 * index) for index in range(4)]
        queries, keys, values, _ = sources
        self.queries, self.keys, self.values, self.positions, self.result = (
            code.load(POINTER, each, data) for each in (*sources, result)
        )
        self.rows, self.heads = number(queries, ne + 8), number(queries, ne + 16)
        self.query_row, self.query_head = number(queries, nb + 8), number(queries, nb + 16)
        self.cells, self.key_heads = number(keys, ne + 8), number(keys, ne + 16)
        self.key_cell, self.key_head = number(keys, nb + 8), number(keys, nb + 16)
        self.value_cell, self.value_head = number(values, nb + 8), number(values, nb + 16)
        self.result_head, self.result_row = number(result, nb + 8), number(result, nb + 16)
        self.group = code.b.udiv(self.heads, self.key_heads)


def _write_attend(module: Value, plan: _Plan) -> None:
    code = Code(module, "attend", [POINTER, I32, I32, POINTER], exported=True)
    result, thread, threads, task = code.arguments
    b, o = code.b, _Operands(code, result)
    thread, threads = b.zext(thread, I64), b.zext(threads, I64)
    own = b.mul(thread, code.load(I64, task, TASK.scratch_bytes))
    base = code.at(code.load(POINTER, task, TASK.scratch), own)
    queries = b.mul(o.rows, o.group)
    passes = b.udiv(b.add(queries, I64(_QUERIES - 1)), I64(_QUERIES))
    items = b.mul(passes, o.key_heads)

    def item(index: Value, _: list[Value]) -> list[Value]:
        number = b.add(thread, b.mul(index, threads))
        head, first = b.udiv(number, passes), b.mul(b.urem(number, passes), I64(_QUERIES))
        count = b.sub(queries, first)
        count = b.select(b.icmp_unsigned("<", count, I64(_QUERIES)), count, I64(_QUERIES))
        _Pass(code, plan, o, base, head, first, count).write()
        return []

    with b.if_then(b.icmp_unsigned("<", thread, items)):
        mine = b.udiv(b.add(b.sub(items, thread), b.sub(threads, I64(1))), threads)
        code.loop(mine, [], item)
    code.end()


class _Pass:
    """Up to _QUERIES queries of one key head, over all blocks."""

    def __init__(
        self, code: Code, plan: _Plan, operands: _Operands, base: Value, head: Value, first: Value, count: Value
    ) -> None:
        """first, count: of the queries, which go through a row's heads of the group, then to the next row."""
        self.code, self.plan, self.o = code, plan, operands
        self.base, self.head, self.first, self.count = base, head, first, count
        tiles = code.b.udiv(code.b.add(count, I64(plan.tile - 1)), I64(plan.tile))
        self.tiles = tiles

    def write(self) -> None:
        code, b, o, places = self.code, self.code.b, self.o, self.plan.scratch
        code.loop(b.mul(self.tiles, I64(self.plan.tile)), [], self._take_query)
        last = code.at(self.base, b.mul(b.sub(self.count, I64(1)), I64(8)))
        most = code.load(I64, last, places.limits)
        keys = code.at(o.keys, b.mul(self.head, o.key_head))
        values = code.at(o.values, b.mul(self.head, o.value_head))

        def block(index: Value, _: list[Value]) -> list[Value]:
            start = b.mul(index, I64(BLOCK))
            count = b.sub(most, start)
            count = b.select(b.icmp_unsigned("<", count, I64(BLOCK)), count, I64(BLOCK))
            for name, cells, stride, to in (
                ("bring_keys", keys, o.key_cell, places.keys),
                ("bring_values", values, o.value_cell, places.values),
            ):
                source = code.at(cells, b.mul(start, stride))
                code.call(name, VOID, source, stride, count, code.at(self.base, to))
            code.loop(self.tiles, [], lambda tile, _: self._meet(tile, start, count))
            return []

        code.loop(b.udiv(b.add(most, I64(BLOCK - 1)), I64(BLOCK)), [], block)
        code.loop(self.count, [], self._give_result)

    def _meet(self, tile: Value, start: Value, count: Value) -> list[Value]:
        """Unless all of the tile's queries end before the block. The last one of a tile sees most."""
        b, code = self.code.b, self.code
        first = b.mul(tile, I64(self.plan.tile))
        last = code.at(self.base, b.mul(b.add(first, I64(self.plan.tile - 1)), I64(8)))
        with b.if_then(b.icmp_unsigned(">", code.load(I64, last, self.plan.scratch.limits), start)):
            code.call("tile", VOID, self.base, first, start, count)
        return []

    def _row_and_head(self, number: Value) -> tuple[Value, Value]:
        b, o = self.code.b, self.o
        index = b.add(self.first, number)
        return b.udiv(index, o.group), b.add(b.mul(self.head, o.group), b.urem(index, o.group))

    def _take_query(self, number: Value, _: list[Value]) -> list[Value]:
        """Lay a query into its tile and begin its sums. Behind the last one, it comes again to fill the tile."""
        code, b, o, places = self.code, self.code.b, self.o, self.plan.scratch
        dims, size = self.plan.head_dim, self.plan.tile
        last = b.sub(self.count, I64(1))
        row, head = self._row_and_head(b.select(b.icmp_unsigned("<", number, last), number, last))
        source = code.at(o.queries, b.add(b.mul(row, o.query_row), b.mul(head, o.query_head)))
        tile = b.mul(b.udiv(number, I64(size)), I64(4 * dims * size))
        target = code.at(self.base, b.add(tile, b.mul(b.urem(number, I64(size)), I64(4))))
        scale = FLOAT(dims**-0.5 * _LOG2_E)

        def dim(index: Value, _: list[Value]) -> list[Value]:
            value = b.fmul(code.load(FLOAT, source, b.mul(index, I64(4))), scale)
            code.store(value, code.at(target, b.mul(index, I64(4 * size))), places.queries)
            return []

        code.loop(dims, [], dim)
        position = b.sext(code.load(I32, o.positions, b.mul(row, I64(4))), I64)
        limit = b.add(position, I64(1))
        limit = b.select(b.icmp_unsigned("<", limit, o.cells), limit, o.cells)
        code.store(limit, code.at(self.base, b.mul(number, I64(8))), places.limits)
        code.store(FLOAT(float("-inf")), code.at(self.base, b.mul(number, I64(4))), places.largest)
        code.store(constant(_WIDE, 0.0), code.at(self.base, b.mul(number, I64(4 * _LANES))), places.totals)
        sums = code.at(self.base, b.mul(number, I64(4 * dims)))
        for offset in range(0, 4 * dims, 4 * _LANES):
            code.store(constant(_WIDE, 0.0), sums, places.sums + offset)
        return []

    def _give_result(self, number: Value, _: list[Value]) -> list[Value]:
        code, b, o, places = self.code, self.code.b, self.o, self.plan.scratch
        row, head = self._row_and_head(number)
        target = code.at(o.result, b.add(b.mul(row, o.result_row), b.mul(head, o.result_head)))
        total = code.load(_WIDE, code.at(self.base, b.mul(number, I64(4 * _LANES))), places.totals)
        for half in (8, 4, 2, 1):
            turned = ir.Constant(_INTS, [lane ^ half for lane in range(_LANES)])
            total = b.fadd(total, b.shuffle_vector(total, total, turned))
        sums = code.at(self.base, b.mul(number, I64(4 * self.plan.head_dim)))
        for offset in range(0, 4 * self.plan.head_dim, 4 * _LANES):
            code.store(b.fdiv(code.load(_WIDE, sums, places.sums + offset), total), target, offset)
        return []
