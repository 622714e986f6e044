"""Random-weight model files of real shapes: speed depends on shape and types, not on what a model learnt.

    python -m benchmarks.shapes 1.1b q4_k_m model.gguf
    python -m benchmarks.shapes 70b q4_k_m model.gguf --sparse

Weights are drawn with mean 0 and variance 1 / (row length), norms are 1, so activations and logits stay of
order 1. Blocks of quantized types are random bits with fixed scales (layouts: ggml-common.h), which costs no
quantizing: 1.1B in seconds. Types follow llama.cpp: `q4_k_m` has Q6_K in half of ffn_down and attn_v,
and every quantized file but q8_0 a Q6_K output matrix. The vocabulary is a made-up one, of SentencePiece or of
Llama 3's byte-level kind, that llama.cpp and Eldric both load. A sparse file has zeros for weights, in a hole that
takes no disk: 40 GB in seconds.
"""

import argparse
import itertools
import os
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-architecture model. Sizes count values."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int = 4096
    tied: bool = False
    rope_base: float = 10000.0
    rope_linear_factor: float | None = None
    freq_factors: bool = False  # Llama 3.1's tensor of frequency factors
    byte_level: bool = False  # a vocabulary of Llama 3's kind in place of a SentencePiece one

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "70b": Shape(
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        ffn=28672,
        vocab=128_256,
        context=131_072,
        rope_base=500_000.0,
        freq_factors=True,
        byte_level=True,
    ),
    "1.1b": Shape(layers=22, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=32000),
    "tiny": Shape(layers=4, hidden=256, heads=8, kv_heads=2, ffn=512, vocab=512, context=2048),
}


@dataclass(frozen=True, slots=True)
class Quant:
    """Which type each matrix of a file has."""

    file_type: gguf.LlamaFileType
    matrices: Kind
    output: Kind
    more_bits: Kind | None = None  # for attn_v and ffn_down in the layers that llama.cpp gives more bits


QUANTS = {
    "f32": Quant(gguf.LlamaFileType.ALL_F32, Kind.F32, Kind.F32),
    "f16": Quant(gguf.LlamaFileType.MOSTLY_F16, Kind.F16, Kind.F16),
    "bf16": Quant(gguf.LlamaFileType.MOSTLY_BF16, Kind.BF16, Kind.BF16),
    "q8_0": Quant(gguf.LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0, Kind.Q8_0),
    "q4_0": Quant(gguf.LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0, Kind.Q6_K),
    "q4_1": Quant(gguf.LlamaFileType.MOSTLY_Q4_1, Kind.Q4_1, Kind.Q6_K),
    "q5_0": Quant(gguf.LlamaFileType.MOSTLY_Q5_0, Kind.Q5_0, Kind.Q6_K),
    "q5_1": Quant(gguf.LlamaFileType.MOSTLY_Q5_1, Kind.Q5_1, Kind.Q6_K),
    "q2_k": Quant(gguf.LlamaFileType.MOSTLY_Q2_K_S, Kind.Q2_K, Kind.Q6_K),
    "q3_k": Quant(gguf.LlamaFileType.MOSTLY_Q3_K_S, Kind.Q3_K, Kind.Q6_K),
    "q5_k": Quant(gguf.LlamaFileType.MOSTLY_Q5_K_S, Kind.Q5_K, Kind.Q6_K),
    "q4_k_m": Quant(gguf.LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K, Kind.Q6_K),
    "q6_k": Quant(gguf.LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K, Kind.Q6_K),
    "iq4_nl": Quant(gguf.LlamaFileType.MOSTLY_IQ4_NL, Kind.IQ4_NL, Kind.Q6_K),
    "iq4_xs": Quant(gguf.LlamaFileType.MOSTLY_IQ4_XS, Kind.IQ4_XS, Kind.Q6_K),
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    kind: Kind
    shape: tuple[int, ...]  # numpy order: rows first
    fill: float | None = None  # a constant, for vectors


def write_model(
    path: Path | str, shape: Shape, quant: str, seed: int = 0, name: str | None = None, *, sparse: bool = False
) -> Path:
    """Write a model file of `shape` with random weights of a mixture in QUANTS; same seed, same bytes.

    sparse: weights and norms are all 0, and a hole in the file.
    """
    path, mixture = Path(path), QUANTS[quant]
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, shape, mixture, name or f"random-{quant}")
    (_add_byte_level_vocabulary if shape.byte_level else _add_vocabulary)(writer, shape.vocab)
    tensors = _tensors(shape, mixture)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _nbytes(tensor), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if sparse:
        writer.close()
        _append_hole(path, tensors)
        return path
    rng = np.random.Generator(np.random.SFC64(seed))
    for tensor in tensors:
        writer.write_tensor_data(_data(tensor, rng))
    writer.close()
    return path


def _append_hole(path: Path, tensors: list[_Tensor]) -> None:
    """Make a file that ends with its tensor infos as long as its tensors say, each of them padded."""
    align = gguf.GGUF_DEFAULT_ALIGNMENT
    start = -(-path.stat().st_size // align) * align
    os.truncate(path, start + sum(-(-_nbytes(tensor) // align) * align for tensor in tensors))


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, mixture: Quant, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(mixture.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    if shape.rope_linear_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_linear_factor)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Control tokens, the 256 bytes, letters, then words of two letters and more: any text tokenizes."""
    if size < 3 + 256 + 1:
        raise ValueError(f"a vocabulary of {size} has no room for the byte tokens")
    control = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{value:02X}>" for value in range(256)]
    words = (
        "".join(letters) for n in itertools.count(1) for letters in itertools.product(string.ascii_lowercase, repeat=n)
    )
    normal = ["▁", *itertools.islice(words, size - len(control) - len(byte) - 1)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(control + byte + normal)
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(normal))])
    writer.add_token_types(
        [int(kinds.UNKNOWN), int(kinds.CONTROL), int(kinds.CONTROL)]
        + [int(kinds.BYTE)] * 256
        + [int(kinds.NORMAL)] * len(normal)
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _add_byte_level_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The 256 bytes, words of up to four letters, and at the end the control tokens, as in Llama 3's files.

    Every way to split a word into two tokens is a merge, up to Llama 3's 280147.
    """
    control = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(254))]
    words = itertools.chain.from_iterable(
        map("".join, itertools.product(string.ascii_lowercase, repeat=length)) for length in (2, 3, 4)
    )
    normal = [*_byte_characters(), *itertools.islice(words, size - len(control) - 256)]
    if len(control) + len(normal) != size:
        raise ValueError(f"a byte-level vocabulary has 512 to {len(control) + 256 + 26**2 + 26**3 + 26**4} tokens")
    known = set(normal)
    splits = ((word[:at], word[at:]) for word in normal[256:] for at in range(1, len(word)))
    merges = (f"{left} {right}" for left, right in splits if left in known and right in known)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(normal + control)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(normal) + [int(gguf.TokenType.CONTROL)] * len(control))
    writer.add_token_merges(list(itertools.islice(merges, 280_147)))
    writer.add_bos_token_id(len(normal))
    writer.add_eos_token_id(len(normal) + 1)


def _byte_characters() -> list[str]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]


def _tensors(shape: Shape, mixture: Quant) -> list[_Tensor]:
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    tensors = [_Tensor("token_embd.weight", mixture.matrices, (shape.vocab, hidden))]
    if shape.freq_factors:
        tensors.append(_Tensor("rope_freqs.weight", Kind.F32, (shape.head_dim // 2,), 1.5))
    for layer in range(shape.layers):
        more = (
            mixture.more_bits if mixture.more_bits is not None and _more_bits(layer, shape.layers) else mixture.matrices
        )
        block = [
            _Tensor("attn_norm", Kind.F32, (hidden,), 1.0),
            _Tensor("attn_q", mixture.matrices, (hidden, hidden)),
            _Tensor("attn_k", mixture.matrices, (kv, hidden)),
            _Tensor("attn_v", more, (kv, hidden)),
            _Tensor("attn_output", mixture.matrices, (hidden, hidden)),
            _Tensor("ffn_norm", Kind.F32, (hidden,), 1.0),
            _Tensor("ffn_gate", mixture.matrices, (shape.ffn, hidden)),
            _Tensor("ffn_up", mixture.matrices, (shape.ffn, hidden)),
            _Tensor("ffn_down", more, (hidden, shape.ffn)),
        ]
        tensors += [_Tensor(f"blk.{layer}.{t.name}.weight", t.kind, t.shape, t.fill) for t in block]
    tensors.append(_Tensor("output_norm.weight", Kind.F32, (hidden,), 1.0))
    if not shape.tied:
        tensors.append(_Tensor("output.weight", mixture.output, (shape.vocab, hidden)))
    return tensors


def _more_bits(layer: int, layers: int) -> bool:
    """The layers to which Q4_K_M gives Q6_K: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _nbytes(tensor: _Tensor) -> int:
    rows, width = (1, *tensor.shape)[-2:]
    return rows * _row_bytes(tensor.kind, width)


def _row_bytes(kind: Kind, width: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if width % block:
        raise ValueError(f"rows of {width} values do not divide into {kind.name} blocks of {block}")
    return width // block * size


def _data(tensor: _Tensor, rng: np.random.Generator) -> NDArray[np.float32] | Bytes:
    if tensor.fill is not None:
        return np.full(tensor.shape, tensor.fill, np.float32)
    rows, width = tensor.shape
    std = width**-0.5
    if tensor.kind in _FLOATS:
        values = rng.standard_normal((rows, width), np.float32)
        values *= np.float32(std)
        return _FLOATS[tensor.kind](values)
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    count = rows * (width // block)
    blocks = np.frombuffer(rng.bytes(count * size), np.uint8).reshape(count, size).copy()
    _SCALES[tensor.kind](blocks, std, rng)
    return blocks.reshape(rows, -1)


def _bf16(values: NDArray[np.float32]) -> Bytes:
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8)


_FLOATS: dict[Kind, Callable[[NDArray[np.float32]], Bytes]] = {
    Kind.F32: lambda values: values.view(np.uint8),
    Kind.F16: lambda values: values.astype(np.float16).view(np.uint8),
    Kind.BF16: _bf16,
}


def _halves(blocks: Bytes, first_byte: int, values: NDArray[np.float32] | float) -> None:
    """Write one f16 into each block, at a byte offset."""
    half = np.broadcast_to(np.asarray(values, np.float32).astype("<f2"), len(blocks))
    blocks[:, first_byte : first_byte + 2] = np.ascontiguousarray(half).view(np.uint8).reshape(-1, 2)


def _signed(span: float) -> Callable[[Bytes, float, np.random.Generator], None]:
    """Types with value = d * q: q spreads evenly over `span`, and d's random sign makes the mean 0."""

    def write(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
        scale = std * 12**0.5 / span
        _halves(blocks, 0, scale * (1 - 2 * rng.integers(0, 2, len(blocks), np.int8)).astype(np.float32))

    return write


def _with_minimum(span: float) -> Callable[[Bytes, float, np.random.Generator], None]:
    """Types with value = d * q + m: m puts the middle of q's range at 0."""

    def write(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
        scale = std * 12**0.5 / span
        _halves(blocks, 0, scale)
        _halves(blocks, 2, -scale * (span - 1) / 2)

    return write


def _k_minimum(span: float) -> Callable[[Bytes, float, np.random.Generator], None]:
    """Q4_K and Q5_K: value = d * s * q - dmin * m, 6-bit s and m with a mean square of about 36.5 ** 2."""

    def write(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
        middle = (span - 1) / 2
        spread = (36.5**2 * span**2 / 12 + 2 * 18.5**2 * middle**2) ** 0.5
        _halves(blocks, 0, std / spread)
        _halves(blocks, 2, std / spread * middle)

    return write


def _q2_k(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    """Q2_K: value = d * s * q - dmin * m, 4-bit s and m (mean square 8.8 ** 2), 2-bit q; d and dmin end the block."""
    spread = (8.8**2 * 4**2 / 12 + 2 * 4.6**2 * 1.5**2) ** 0.5
    _halves(blocks, 80, std / spread)
    _halves(blocks, 82, std / spread * 1.5)


def _q3_k(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    """Q3_K: value = d * (s - 32) * (q - 4), 6-bit s (root mean square 18.5), 3-bit q (2.35); d ends the block."""
    _halves(blocks, 108, std / (18.5 * 2.35))


def _q6_k(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    """Q6_K: value = d * s * (q - 32), 8-bit s (root mean square 73.9), 6-bit q (18.5); d ends the block."""
    _halves(blocks, 208, std / (73.9 * 18.5))


def _iq4_xs(blocks: Bytes, std: float, rng: np.random.Generator) -> None:
    """IQ4_XS: value = d * (s - 32) * v, 6-bit s (root mean square 18.5), v of a table (69.5); d begins the block."""
    _halves(blocks, 0, std / (18.5 * 69.5))


_SCALES: dict[Kind, Callable[[Bytes, float, np.random.Generator], None]] = {
    Kind.Q4_0: _signed(16),
    Kind.Q5_0: _signed(32),
    Kind.Q8_0: _signed(256),
    Kind.Q4_1: _with_minimum(16),
    Kind.Q5_1: _with_minimum(32),
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _k_minimum(16),
    Kind.Q5_K: _k_minimum(32),
    Kind.Q6_K: _q6_k,
    Kind.IQ4_NL: _signed(240),
    Kind.IQ4_XS: _iq4_xs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight model file.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("quant", choices=QUANTS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--sparse", action="store_true", help="zeros for weights, without taking disk for them")
    arguments = parser.parse_args()
    path = write_model(arguments.path, SHAPES[arguments.shape], arguments.quant, sparse=arguments.sparse)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
