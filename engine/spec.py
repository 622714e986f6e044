"""What a model computes, as numbers and options: a backend turns a ModelSpec and a layer range into a graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eldric.engine.families.base import Activation, Family, RopeKind
from eldric.engine.gguf import ModelFile

RopeScaling = Literal["none", "linear"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: pair i of a head turns by position / factor / freq_factors[i] * base ** (-2i / dim)."""

    kind: RopeKind
    dim: int  # how many values of a head are turned
    base: float
    scaling: RopeScaling
    factor: float  # linear scaling: ggml's freq_scale is 1 / factor; 1.0 without scaling
    freq_factors: str | None  # name of a F32 tensor [dim / 2], or None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's sizes and options. Sizes count values, not bytes."""

    architecture: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # of queries, keys and values alike
    ffn_size: int
    vocab_size: int
    context_length: int  # tokens that the model was trained for
    norm_eps: float
    rope: RopeSpec
    activation: Activation
    qkv_bias: bool
    attn_output_bias: bool
    ffn_bias: bool
    tied_output: bool  # no output.weight: token_embd.weight is the output matrix too

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes that a family's tensor table names."""
        return {
            "hidden": self.hidden_size,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "ffn": self.ffn_size,
            "vocab": self.vocab_size,
            "half_rope": self.rope.dim // 2,
        }

    @property
    def family(self) -> Family:
        raise NotImplementedError


def spec_of(model: ModelFile) -> ModelSpec:
    """Read a model's spec and check every tensor's name, shape and type against it.

    Raises UnsupportedModel for an unknown architecture or option, InvalidModel for missing or insane values.
    """
    raise NotImplementedError
