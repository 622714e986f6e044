"""What a model computes, as numbers and options: a backend turns a spec and a layer range into a graph."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eldric.engine.errors import InvalidModel, UnsupportedModel
from eldric.engine.families import FAMILIES
from eldric.engine.families.base import Activation, Family, RopeKind, TensorRole
from eldric.engine.gguf import ModelFile
from eldric.engine.metadata import Metadata
from eldric.engine.tensor_types import MATRIX_TYPES, TensorType

RopeScaling = Literal["none", "linear"]

# Bounds of sane files, well above the largest models: they keep all later arithmetic in range.
MAX_LAYERS = 1024
MAX_HEADS = 1024
_POOLS_NOTHING, _POOLS_LAST = 0, 3  # of `enum llama_pooling_type`, llama.h
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 20  # hidden and feed-forward sizes
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 26
_VECTOR_TYPES = frozenset({TensorType.F32})  # what ggml adds to, or multiplies with, F32 activations


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    Pair i of a head turns by the angle position / factor / freq_factors[i] * base ** (-2 i / dim).
    """

    kind: RopeKind
    dim: int  # how many values of a head turn
    base: float
    scaling: RopeScaling
    factor: float  # ggml's freq_scale is 1 / factor; 1.0 without scaling
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
    embeds_last: bool  # an embedding is what becomes of the last token, and not of all, which this engine does not do

    @property
    def family(self) -> Family:
        """The data that a graph needs besides: the tensor table, above all."""
        return FAMILIES[self.architecture]

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes that tensor tables name."""
        return {
            "hidden": self.hidden_size,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "ffn": self.ffn_size,
            "vocab": self.vocab_size,
            "half_rope": self.rope.dim // 2,
        }


def spec_of(model: ModelFile) -> ModelSpec:
    """Read a model's spec and hold every tensor's name, shape and type against it: what passes can go to ggml.

    Raises UnsupportedModel for an architecture, option or tensor that this engine does not run, and InvalidModel
    for values that are missing or cannot be.
    """
    architecture = model.metadata.get_str("general.architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"architecture {architecture[:80]!r} is not supported; supported: {known}")
    keys = _Keys(model.metadata, f"{architecture}.", model.paths[0])
    layers = keys.count("block_count", MAX_LAYERS)
    table = {name: role for role in family.tensors.values() for name in role.names(range(layers))}
    unknown = [name for name in model.tensors if name not in table]
    if unknown:
        names = ", ".join(unknown[:3])
        raise UnsupportedModel(f"{len(unknown)} tensors are not of a {architecture} model of {layers} layers: {names}")
    groups = {table[name].group for name in model.tensors}
    spec = _read(keys, family, layers, groups)
    expected = {name: role for name, role in table.items() if role.group is None or role.group in groups}
    _check_tensors(model, expected, spec.sizes)
    return spec


class _Keys:
    """Reads the keys that begin with the architecture's name, within bounds."""

    def __init__(self, metadata: Metadata, prefix: str, path: Path) -> None:
        self.metadata, self.prefix, self.path = metadata, prefix, path

    def count(self, name: str, limit: int, default: int | None = None) -> int:
        """An integer from 1 to limit."""
        key = self.prefix + name
        if self.metadata.is_array(key):
            raise UnsupportedModel(f"{key} has a value for each layer, which this engine does not run")
        value = self.metadata.get_int(key) if default is None else self.metadata.get_int(key, default)
        if not 1 <= value <= limit:
            raise InvalidModel(f"{key} is {value}, expected 1 to {limit}", self.path)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        key = self.prefix + name
        value = self.metadata.get_float(key) if default is None else self.metadata.get_float(key, default)
        if not 0 < value < math.inf:
            raise InvalidModel(f"{key} is {value}, expected a finite number above 0", self.path)
        return value

    def refuse_unless(self, usual: bool, name: str, found: str) -> None:
        if not usual:
            raise UnsupportedModel(f"{self.prefix}{name}: {found}, which this engine does not run")


def _read(keys: _Keys, family: Family, layers: int, groups: Set[str | None]) -> ModelSpec:
    """groups: of the optional tensors in the file. The keys' meanings and defaults are llama.cpp's."""
    experts = keys.metadata.get_int(keys.prefix + "expert_count", 0)
    keys.refuse_unless(experts == 0, "expert_count", f"{experts} experts")
    causal = keys.metadata.get_bool(keys.prefix + "attention.causal", True)
    keys.refuse_unless(causal, "attention.causal", "attention to later tokens")
    hidden_size = keys.count("embedding_length", MAX_WIDTH)
    heads = keys.count("attention.head_count", MAX_HEADS)
    kv_heads = keys.count("attention.head_count_kv", MAX_HEADS, heads)
    if heads % kv_heads:
        raise InvalidModel(f"{heads} heads cannot share {kv_heads} key-value heads", keys.path)
    head_dim = _head_dim(keys, hidden_size, heads)
    return ModelSpec(
        architecture=family.architecture,
        layers=layers,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=keys.count("feed_forward_length", MAX_WIDTH),
        vocab_size=_vocab_size(keys),
        context_length=keys.count("context_length", MAX_CONTEXT),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, family, head_dim, "freq_factors" in groups),
        activation=family.activation,
        qkv_bias="qkv_bias" in groups,
        attn_output_bias="attn_output_bias" in groups,
        ffn_bias="ffn_bias" in groups,
        tied_output="output" not in groups,
        embeds_last=keys.metadata.get_int(keys.prefix + "pooling_type", _POOLS_LAST) in (_POOLS_NOTHING, _POOLS_LAST),
    )


def _head_dim(keys: _Keys, hidden_size: int, heads: int) -> int:
    key = keys.prefix + "attention.key_length"
    if key not in keys.metadata and hidden_size % heads:
        raise InvalidModel(f"{heads} heads do not divide the hidden size {hidden_size}", keys.path)
    head_dim = keys.count("attention.key_length", MAX_HEAD_DIM, hidden_size // heads)
    if head_dim % 2:
        raise InvalidModel(f"heads of {head_dim} values cannot turn in pairs", keys.path)
    value_dim = keys.count("attention.value_length", MAX_HEAD_DIM, head_dim)
    keys.refuse_unless(value_dim == head_dim, "attention.value_length", f"{value_dim} beside keys of {head_dim}")
    return head_dim


def _vocab_size(keys: _Keys) -> int:
    """The number of tokens, as llama.cpp counts it; a file without a vocabulary must give the key."""
    tokens = "tokenizer.ggml.tokens"
    if tokens not in keys.metadata:
        return keys.count("vocab_size", MAX_VOCAB)
    size = keys.metadata.array_length(tokens)
    if not 1 <= size <= MAX_VOCAB:
        raise InvalidModel(f"{tokens} has {size} elements, expected 1 to {MAX_VOCAB}", keys.path)
    return size


def _rope(keys: _Keys, family: Family, head_dim: int, has_factors: bool) -> RopeSpec:
    dim = keys.count("rope.dimension_count", MAX_HEAD_DIM, head_dim)
    keys.refuse_unless(dim == head_dim, "rope.dimension_count", f"{dim} of a head's {head_dim} values turn")
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    keys.refuse_unless(attn_factor == 1.0, "rope.scaling.attn_factor", f"attention is scaled by {attn_factor}")
    scaling = keys.metadata.get_str(keys.prefix + "rope.scaling.type", "linear")
    keys.refuse_unless(scaling in ("none", "linear"), "rope.scaling.type", repr(scaling[:80]))
    name = "rope.scaling.factor"
    if keys.prefix + name not in keys.metadata:
        name = "rope.scale_linear"  # what it was called before
    factor = 1.0 if scaling == "none" else keys.number(name, 1.0)
    return RopeSpec(
        kind=family.rope,
        dim=dim,
        base=keys.number("rope.freq_base", 10000.0),
        scaling="none" if factor == 1.0 else "linear",
        factor=factor,
        freq_factors=family.tensors["rope_freqs"].name if has_factors else None,
    )


def _check_tensors(model: ModelFile, expected: Mapping[str, TensorRole], sizes: Mapping[str, int]) -> None:
    """ggml aborts the process on a wrong shape or type, so none may get past here."""
    for name, role in expected.items():
        info = model.tensors.get(name)
        if info is None:
            why = "is missing" if role.group is None else "is missing, though others that belong to it are there"
            raise InvalidModel(f"the tensor {name} {why}", model.paths[0])
        shape = tuple(sizes[size] for size in role.shape)
        if _padded(info.shape) != _padded(shape):
            found, wanted = list(info.shape), list(shape)
            raise InvalidModel(f"the tensor {name} has the shape {found}, expected {wanted}", model.paths[info.file])
        if info.type not in (MATRIX_TYPES if len(shape) > 1 else _VECTOR_TYPES):
            raise UnsupportedModel(f"the tensor {name} is of type {info.type.name}, which this engine does not run")


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Trailing dimensions of 1 say nothing: ggml itself fills up to four of them."""
    return shape + (1,) * (4 - len(shape))
