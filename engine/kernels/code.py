"""A thin layer over llvmlite's IR builder: addresses by byte offset, broadcasts, and counted loops."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

Value = Any  # llvmlite has no types

VOID, BYTE, HALF, FLOAT = ir.VoidType(), ir.IntType(8), ir.HalfType(), ir.FloatType()
I16, I32, I64, POINTER = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.PointerType()


def vector(element: Value, lanes: int) -> Value:
    return ir.VectorType(element, lanes)


def constant(kind: Value, value: float) -> Value:
    """A number, or a vector that holds it in every lane."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


class Code:
    """The body of one function while it is written."""

    def __init__(self, module: Value, name: str, arguments: Sequence[Value], exported: bool = False) -> None:
        """arguments: their types. Functions that are not exported are inlined where that pays."""
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        if not exported:
            self.function.linkage = "internal"
        self.arguments = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def at(self, pointer: Value, offset: Value) -> Value:
        """The address `offset` bytes behind a pointer."""
        if isinstance(offset, int):
            offset = I64(offset)
        return self.b.gep(pointer, [offset], source_etype=BYTE)

    def load(self, kind: Value, pointer: Value, offset: Value = 0) -> Value:
        """A value that may lie at any byte."""
        loaded = self.b.load(self.at(pointer, offset), typ=kind)
        loaded.align = 1
        return loaded

    def store(self, value: Value, pointer: Value, offset: Value = 0) -> None:
        self.b.store(value, self.at(pointer, offset)).align = 1

    def broadcast(self, value: Value, lanes: int) -> Value:
        kind = vector(value.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), constant(vector(I32, lanes), 0))

    def call(self, name: str, result: Value, *arguments: Value) -> Value:
        """Call an intrinsic, or another function of the module."""
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [value.type for value in arguments]), name)
        return self.b.call(found, arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def prefetch(self, pointer: Value, offset: int) -> None:
        """Ask for a cache line that will be read soon; any address will do."""
        self.call("llvm.prefetch.p0", VOID, self.at(pointer, offset), I32(0), I32(3), I32(1))

    def loop(
        self, count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """Run body(index, values) -> next values for 0 <= index < count, which must not be empty. Returns the last."""
        if isinstance(count, int):
            count = I64(count)
        before = self.b.block
        top = self.function.append_basic_block()
        self.b.branch(top)
        self.b.position_at_end(top)
        index = self.b.phi(I64)
        index.add_incoming(I64(0), before)
        values = []
        for start in carried:
            value = self.b.phi(start.type)
            value.add_incoming(start, before)
            values.append(value)
        results = list(body(index, list(values)))
        following = self.b.add(index, I64(1))
        index.add_incoming(following, self.b.block)
        for value, result in zip(values, results, strict=True):
            value.add_incoming(result, self.b.block)
        after = self.function.append_basic_block()
        self.b.cbranch(self.b.icmp_unsigned("<", following, count), top, after)
        self.b.position_at_end(after)
        return results

    def end(self) -> None:
        self.b.ret_void()
