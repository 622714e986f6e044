"""Model files for tests: two real ones, and small Llama files of chosen shapes, options and types."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from eldric.cli.demo_model import smollm2

__all__ = ["smollm2"]


def storyteller() -> Path:
    """A chat model of 5 MB: 6 layers, hidden 256, 8 heads, 4 KV heads, Q8_0, vocabulary 839, its own output."""
    return Path(__file__).parent / "data" / "storyteller-q8_0.gguf"


@dataclass(frozen=True, slots=True)
class SmallLlama:
    """A Llama of random weights; norms are near 1, so that activations stay of order 1. Sizes count values."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = 288
    context: int = 512
    type: str = "F32"  # of the matrices: any that gguf.quants can write
    rope_base: float = 10000.0
    linear_factor: float | None = None
    freq_factors: bool = False
    tied: bool = False
    qkv_bias: bool = False
    attn_output_bias: bool = False
    ffn_bias: bool = False
    seed: int = 0

    def metadata(self) -> dict[str, Any]:
        """The keys under `llama.`; values as GGUFWriter.add_key_value takes them."""
        keys: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": self.rope_base,
            "vocab_size": self.vocab,
        }
        if self.linear_factor is not None:
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.linear_factor}
        return {f"llama.{name}": value for name, value in keys.items()}

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors, in numpy order (ggml's reversed), in file order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocab, self.hidden)
        if self.freq_factors:
            yield "rope_freqs.weight", (self.head_dim // 2,)
        for layer in range(self.layers):
            for name, rows, width, has_bias in (
                ("attn_q", q, self.hidden, self.qkv_bias),
                ("attn_k", kv, self.hidden, self.qkv_bias),
                ("attn_v", kv, self.hidden, self.qkv_bias),
                ("attn_output", self.hidden, q, self.attn_output_bias),
                ("ffn_gate", self.ffn, self.hidden, self.ffn_bias),
                ("ffn_up", self.ffn, self.hidden, self.ffn_bias),
                ("ffn_down", self.hidden, self.ffn, self.ffn_bias),
            ):
                yield f"blk.{layer}.{name}.weight", (rows, width)
                if has_bias:
                    yield f"blk.{layer}.{name}.bias", (rows,)
            yield f"blk.{layer}.attn_norm.weight", (self.hidden,)
            yield f"blk.{layer}.ffn_norm.weight", (self.hidden,)
        yield "output_norm.weight", (self.hidden,)
        if not self.tied:
            yield "output.weight", (self.vocab, self.hidden)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights, before quantizing."""
        rng = np.random.default_rng(self.seed)
        weights = {}
        for name, shape in self.shapes():
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
            if name == "rope_freqs.weight":
                values = np.linspace(1, 8, shape[0], dtype=np.float32)
            elif name.endswith("norm.weight"):
                values += 1
            weights[name] = values
        return weights


def write_small_llama(
    path: Path,
    model: SmallLlama,
    *,
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, NDArray[np.float32] | None] = {},
    split_tensors: int = 0,
    empty_first: bool = False,
) -> Path:
    """Write `model`; return the path of the file, or of the first part.

    metadata, tensors: what to put in place of the model's own, or beside it; None takes out.
    split_tensors: most tensors in a part of a split set, 0 for one file; empty_first: its first part has none.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_tensors, small_first_shard=empty_first)
    for key, value in (model.metadata() | dict(metadata)).items():
        if value is not None:
            writer.add_key_value(key, value, _value_type(value))
    _add_vocabulary(writer, model.vocab)
    for name, weights in (model.tensors() | dict(tensors)).items():
        if weights is None:
            continue
        kind = gguf.GGMLQuantizationType[model.type if weights.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split_tensors:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _value_type(value: Any) -> gguf.GGUFValueType:
    found = gguf.GGUFValueType.get_type(value)
    return gguf.GGUFValueType.UINT32 if found is gguf.GGUFValueType.INT32 else found


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Three control tokens, the 256 bytes, then made-up words: any text tokenizes."""
    kinds = gguf.TokenType
    words = [f"▁{number}" for number in range(size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(words))])
    types = [kinds.UNKNOWN] + [kinds.CONTROL] * 2 + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(words)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
