"""What a model's header says, read once and kept: nothing here holds a file open."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from eldric.engine.errors import InvalidModel, UnsupportedModel
from eldric.engine.gguf import ModelFile
from eldric.engine.metadata import Metadata
from eldric.engine.shard import ModelCosts, model_costs
from eldric.engine.spec import ModelSpec, spec_of
from eldric.engine.tensors import TensorInfo

#: A text of a header is shown up to here: a chat template is some 10,000 characters long.
_MAX_TEXT = 1 << 16


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """A sound model file (or split set). Sizes count values, 0 where the header does not say.

    model: closed, its tensor infos still good. problem: why the engine does not run it; then spec and costs are None.
    entries: scalars as text, arrays named with their length. header_bytes: before the first file's tensor data.
    """

    model: ModelFile
    architecture: str
    quantization: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    entries: Mapping[str, str]
    sha256: str
    spec: ModelSpec | None
    costs: ModelCosts | None
    problem: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.model.tensors


def read_header(path: Path) -> ModelHeader:
    """Reads the header of a model file; of a split set, `path` is the first.

    An architecture or option that the engine does not run is noted, not raised. Raises InvalidModel, OSError.
    """
    with ModelFile.open(path) as model:
        spec, costs, problem = None, None, ""
        try:
            spec = spec_of(model)
            costs = model_costs(model, spec)
        except UnsupportedModel as error:
            problem = str(error)
        metadata = model.metadata
        architecture = metadata.get_str("general.architecture", "")
        sizes = _sizes_of(spec) if spec else _claimed_sizes(metadata, architecture)
        return ModelHeader(
            model=model,
            architecture=architecture,
            quantization=_quantization(model.tensors),
            parameters=sum(prod(tensor.shape) for tensor in model.tensors.values()),
            **sizes,
            entries=_entries(metadata),
            sha256=model.header_sha256(),
            spec=spec,
            costs=costs,
            problem=problem,
        )


def _sizes_of(spec: ModelSpec) -> dict[str, int]:
    return {
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "vocab_size": spec.vocab_size,
        "context": spec.context_length,
    }


def _claimed_sizes(metadata: Metadata, architecture: str) -> dict[str, int]:
    """Sizes of an architecture that the engine does not know, by the keys that most of them share."""
    heads = _number(metadata, f"{architecture}.attention.head_count")
    vocab = _number(metadata, f"{architecture}.vocab_size")
    if not vocab and metadata.is_array("tokenizer.ggml.tokens"):
        vocab = metadata.array_length("tokenizer.ggml.tokens")
    return {
        "layers": _number(metadata, f"{architecture}.block_count"),
        "hidden_size": _number(metadata, f"{architecture}.embedding_length"),
        "heads": heads,
        "kv_heads": _number(metadata, f"{architecture}.attention.head_count_kv") or heads,
        "vocab_size": vocab,
        "context": _number(metadata, f"{architecture}.context_length"),
    }


def _number(metadata: Metadata, key: str) -> int:
    """A size that fits a uint32, or 0: some architectures have one per layer, and nobody checked these values."""
    try:
        value = metadata.get_int(key, 0)
    except InvalidModel:
        return 0
    return value if 0 <= value < 1 << 32 else 0


def _quantization(tensors: Mapping[str, TensorInfo]) -> str:
    """The type that holds most values of the matrices, e.g. "Q4_K"; empty without any."""
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            values[tensor.type.name] += prod(tensor.shape)
    return max(values, key=values.__getitem__, default="")


def _entries(metadata: Metadata) -> dict[str, str]:
    entries = {}
    for key in metadata:
        if metadata.is_array(key):
            entries[key] = f"array of {metadata.array_length(key)}"
            continue
        try:
            value = metadata[key]
        except InvalidModel:
            entries[key] = "unreadable"
            continue
        entries[key] = _text(value)
    return entries


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.7g}"  # what a 32-bit float can say: 1e-05, not 9.999999747378752e-06
    text = str(value)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
