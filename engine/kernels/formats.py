"""The types that the engine's own kernels multiply."""

from collections.abc import Callable

from eldric.engine.kernels.blocks_of_32 import IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from eldric.engine.kernels.blocks_of_256 import IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from eldric.engine.kernels.half import F16
from eldric.engine.kernels.layout import Layout
from eldric.engine.tensor_types import TensorType

_ALL = (F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)

FORMATS: dict[TensorType, Callable[[int], Layout]] = {each.kind: each for each in _ALL}
