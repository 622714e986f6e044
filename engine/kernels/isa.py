"""What the processor at hand offers to the kernels: how many lanes, and which instruction multiplies bytes."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llvmlite import binding

from eldric.engine.kernels.code import BYTE, I16, Code, Value, constant, vector

_MOST_IN_PAIRS = 128  # 2 * 128 * 127 is less than 2 ** 15


@dataclass(frozen=True, slots=True)
class Isa:
    """A vector extension. lanes: 32-bit lanes of a vector, which are the rows of a panel."""

    name: str
    lanes: int
    dot: Literal["vnni", "pairs"]  # one instruction, or two that go through 16 bits

    def multiply_add(self, code: Code, total: Value, unsigned: Value, signed: Value, most: int) -> Value:
        """total + the sum of four products in each lane. All are vectors of 32-bit lanes: of sums, or of 4 bytes.

        most: the largest unsigned byte. Two products must fit in 16 bits where there is no instruction for four, so
        the highest bit is multiplied by itself there.
        """
        kind = total.type
        if self.dot == "vnni":
            return code.call(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", kind, total, unsigned, signed)
        if most > _MOST_IN_PAIRS:
            high = code.b.and_(unsigned, constant(kind, 0x80808080))
            total = self.multiply_add(code, total, high, signed, _MOST_IN_PAIRS)
            unsigned = code.b.and_(unsigned, constant(kind, 0x7F7F7F7F))
        bytes_kind, pairs_kind = vector(BYTE, 4 * self.lanes), vector(I16, 2 * self.lanes)
        as_bytes = (code.b.bitcast(unsigned, bytes_kind), code.b.bitcast(signed, bytes_kind))
        pairs = code.call("llvm.x86.avx2.pmadd.ub.sw", pairs_kind, *as_bytes)
        return code.b.add(total, code.call("llvm.x86.avx2.pmadd.wd", kind, pairs, constant(pairs_kind, 1)))


AVX512_VNNI = Isa("avx512-vnni", 16, "vnni")
AVX_VNNI = Isa("avx-vnni", 8, "vnni")
AVX2 = Isa("avx2", 8, "pairs")
ISAS = {isa.name: isa for isa in (AVX512_VNNI, AVX_VNNI, AVX2)}


def isa_of(features: Mapping[str, bool]) -> Isa | None:
    """The best extension for these processor features, as LLVM names them; None if no kernel was written for it."""
    if features.get("avx512vnni") and features.get("avx512bw"):
        return AVX512_VNNI
    if features.get("avxvnni") and features.get("fma") and features.get("f16c"):
        return AVX_VNNI
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        return AVX2
    return None


@functools.cache
def host_features() -> Mapping[str, bool]:
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # llvmlite does not know them for every processor
        return {}
