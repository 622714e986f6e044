"""What a model family is: data. Its options, and a table of its tensors."""

from collections.abc import Mapping
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

    shape names sizes of ModelSpec.sizes, in ggml order; one name is a vector (always F32), two are a matrix.
    group: None for a required tensor; optional tensors of one group are all in the file or none is.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    place: Place
    group: str | None = None

    def name_in(self, layer: int | None = None) -> str:
        """The tensor's name in the file; a block's tensor needs its layer."""
        return self.name.format(layer=layer)


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that sets an architecture apart from another."""

    architecture: str
    rope: RopeKind
    activation: Activation
    tensors: Mapping[str, TensorRole]  # by role
