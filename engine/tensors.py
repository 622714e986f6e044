"""Where a tensor lies in a model's files, and what it is."""

from dataclasses import dataclass

from eldric.engine.tensor_types import TensorType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model file. shape is in ggml order: shape[0] (ne[0]) values make a contiguous row."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: int  # index of the file in the split set
    offset: int  # of the first byte, from the start of that file
    nbytes: int
