"""What a model family is: data. Its options, and a table of its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

RopeKind = Literal["norm", "neox"]  # pairs of neighbours (2i, 2i+1), or of halves (i, i + dim/2)
Activation = Literal["silu"]


class Place(Enum):
    """Which stages hold a tensor."""

    HEAD = "head"
    BLOCK = "block"  # the stage of that layer
    TAIL = "tail"
    EVERY = "every"


@dataclass(frozen=True, slots=True)
class TensorRole:
    """One row of a family's tensor table.

    name: in the file, with {layer} for the layer.
    shape: names of sizes in ModelSpec.sizes, in ggml order. One is a vector, always F32; two are a matrix.
    group: None for a required tensor. Of optional tensors of one group, all are in the file or none is.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    place: Place
    group: str | None = None

    def name_in(self, layer: int) -> str:
        """The tensor's name in the file; the layer matters for a block's tensor only."""
        return self.name.format(layer=layer)

    def names(self, layers: Iterable[int]) -> list[str]:
        """The names in the file: one for each layer if the tensor is a block's, else one."""
        return [self.name_in(layer) for layer in layers] if self.place is Place.BLOCK else [self.name]


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that sets an architecture apart from another."""

    architecture: str
    rope: RopeKind
    activation: Activation
    tensors: Mapping[str, TensorRole]  # by role
