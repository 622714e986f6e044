"""What a stage needs of a model: tensors, byte ranges, memory. Pure: nothing here reads a file."""

from collections.abc import Mapping
from dataclasses import dataclass

from eldric.engine.gguf import ModelFile
from eldric.engine.spec import ModelSpec
from eldric.engine.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Half-open range of layers [start, stop), in the model's own numbering. Raises InvalidLayers when empty or negative."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [offset, offset + length) of file number `file` of a split set."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one stage holds."""

    layers: LayerRange
    is_head: bool
    is_tail: bool
    tensors: Mapping[str, TensorInfo]
    ranges: tuple[ByteRange, ...]  # exactly the tensors' bytes: sorted, adjacent ones merged
    nbytes: int  # sum of the tensors' sizes


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What each part of a model weighs, in bytes, for the planner."""

    layer_bytes: tuple[int, ...]  # of each layer's own tensors
    head_bytes: int  # token embedding
    tail_bytes: int  # output norm and output matrix; a tied embedding is in head_bytes and here
    tied_bytes: int  # what a stage that is head and tail holds once though both count it
    stage_bytes: int  # what every stage holds besides (frequency factors)
    kv_bytes_per_cell_per_layer: int  # K and V of one position, f16

    def weights(self, layers: LayerRange) -> int:
        """Bytes of the weights of a stage."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a stage needs."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


def shard_of(model: ModelFile, spec: ModelSpec, layers: LayerRange) -> Shard:
    """The tensors of a layer range, with what head and tail need besides. Raises InvalidLayers for a range outside the model."""
    raise NotImplementedError


def model_costs(model: ModelFile, spec: ModelSpec) -> ModelCosts:
    raise NotImplementedError


def memory_estimate(
    spec: ModelSpec, costs: ModelCosts, layers: LayerRange, *, context: int, slots: int, chunk: int
) -> MemoryEstimate:
    """context: cells per slot; slots: sequences held at once; chunk: most rows of one step."""
    raise NotImplementedError
