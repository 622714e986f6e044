"""The element types of ggml tensors: how many values a block holds and how many bytes it takes.

Numbers and sizes are those of `enum ggml_type` and the block structs of ggml 0.26 (ggml.h, ggml-common.h).
"""

from enum import IntEnum


class TensorType(IntEnum):
    """A ggml element type. A row is a whole number of blocks of `block_size` values, `type_bytes` bytes each."""

    block_size: int
    type_bytes: int

    def __new__(cls, number: int, block_size: int, type_bytes: int) -> "TensorType":
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size, member.type_bytes = block_size, type_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of `values` values, which must be a multiple of `block_size`."""
        return values // self.block_size * self.type_bytes


# Types that ggml makes for itself while it multiplies (Q8_1, Q8_K) or that hold no weights of a matrix product.
_NOT_MATRICES = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
MATRIX_TYPES = frozenset(kind for kind in TensorType if kind.name not in _NOT_MATRICES)
