"""Writes `largest`: the index of the largest value of each row, found while the row is still in the cache."""

from llvmlite import ir

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels.code import FLOAT, I32, I64, POINTER, Code, Value, constant, vector

NOT_A_NUMBER = -1  # the answer for a row that holds NaN, or whose largest value is infinite


def write_module(lanes: int) -> str:
    """LLVM IR of largest(result tensor, thread, threads, nothing), a custom operation of ggml.

    The source is [values, rows] of f32 with at least `lanes` values; the result is [rows] of i32. Of equal values, the
    first counts, as numpy's argmax has it.
    """
    module = ir.Module(name="largest")
    code = Code(module, "largest", [POINTER, I32, I32, POINTER], exported=True)
    b, (result, thread, threads, _) = code.b, code.arguments
    source = code.load(POINTER, result, Tensor.src.offset)
    width = code.load(I64, source, Tensor.ne.offset)
    stride, rows = code.load(I64, source, Tensor.nb.offset + 8), code.load(I64, source, Tensor.ne.offset + 8)
    values, target = (code.load(POINTER, each, Tensor.data.offset) for each in (source, result))
    first, step = b.zext(thread, I64), b.zext(threads, I64)

    def row(index: Value, _: list[Value]) -> list[Value]:
        number = b.add(first, b.mul(index, step))
        found = _largest_of(code, code.at(values, b.mul(number, stride)), width, lanes)
        code.store(found, code.at(target, b.mul(number, I64(4))))
        return []

    with b.if_then(b.icmp_unsigned("<", first, rows)):
        mine = b.udiv(b.add(b.sub(rows, first), b.sub(step, I64(1))), step)
        code.loop(mine, [], row)
    code.end()
    return str(module)


def _largest_of(code: Code, row: Value, width: Value, lanes: int) -> Value:
    """In each lane the largest value so far and where it was; the last vector overlaps the one before."""
    b, floats, ints = code.b, vector(FLOAT, lanes), vector(I32, lanes)
    last = b.sub(width, I64(lanes))
    own = ir.Constant(ints, list(range(lanes)))

    def look(index: Value, carried: list[Value]) -> list[Value]:
        best, places, strange = carried
        start = b.mul(index, I64(lanes))
        start = b.select(b.icmp_unsigned("<", start, last), start, last)
        values = code.load(floats, row, b.mul(start, I64(4)))
        better = b.fcmp_ordered(">", values, best)
        here = b.add(own, code.broadcast(b.trunc(start, I32), lanes))
        unordered = b.fcmp_unordered("uno", values, values)
        return [b.select(better, values, best), b.select(better, here, places), b.or_(strange, unordered)]

    vectors = b.udiv(b.add(width, I64(lanes - 1)), I64(lanes))
    nothing = [constant(floats, float("-inf")), constant(ints, 0), constant(vector(ir.IntType(1), lanes), 0)]
    best, places, strange = code.loop(vectors, nothing, look)
    most = code.call(f"llvm.vector.reduce.fmax.v{lanes}f32", FLOAT, best)
    is_most = b.fcmp_ordered("==", best, code.broadcast(most, lanes))
    firsts = b.select(is_most, places, constant(ints, 0x7FFFFFFF))
    index = code.call(f"llvm.vector.reduce.smin.v{lanes}i32", I32, firsts)
    is_nan = code.call(f"llvm.vector.reduce.or.v{lanes}i1", ir.IntType(1), strange)
    is_finite = b.fcmp_ordered("==", b.fsub(most, most), FLOAT(0.0))
    return b.select(b.and_(is_finite, b.not_(is_nan)), index, I32(NOT_A_NUMBER))
