"""Reading a model's spec: the Llama family's options, and what is refused before ggml sees it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldric.engine.errors import InvalidModel, UnsupportedModel
from eldric.engine.families import FAMILIES
from eldric.engine.gguf import ModelFile
from eldric.engine.spec import ModelSpec, RopeSpec, spec_of
from tests.models import SmallLlama, smollm2, storyteller, write_small_llama

DEFAULT = SmallLlama()
ROPE = RopeSpec(kind="norm", dim=16, base=10000.0, scaling="none", factor=1.0, freq_factors=None)
SMALL = ModelSpec(
    architecture="llama",
    layers=2,
    hidden_size=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_size=96,
    vocab_size=288,
    context_length=512,
    norm_eps=float(np.float32(1e-5)),
    rope=ROPE,
    activation="silu",
    qkv_bias=False,
    attn_output_bias=False,
    ffn_bias=False,
    tied_output=False,
    embeds_last=True,
)


def read(folder: Path, shape: SmallLlama = DEFAULT, **changes: Any) -> ModelSpec:
    """The spec of a small model. changes: keys without `llama.`, written `attention__key_length`; tensors=..."""
    tensors = changes.pop("tensors", {})
    metadata = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    with ModelFile.open(write_small_llama(folder / "m.gguf", shape, metadata=metadata, tensors=tensors)) as model:
        return spec_of(model)


def test_real_models_have_their_known_specs() -> None:
    with ModelFile.open(smollm2()) as model:
        assert spec_of(model) == ModelSpec(
            architecture="llama",
            layers=30,
            hidden_size=576,
            heads=9,
            kv_heads=3,
            head_dim=64,
            ffn_size=1536,
            vocab_size=49152,
            context_length=8192,
            norm_eps=float(np.float32(1e-5)),
            rope=replace(ROPE, dim=64, base=100000.0),
            activation="silu",
            qkv_bias=False,
            attn_output_bias=False,
            ffn_bias=False,
            tied_output=True,
            embeds_last=True,
        )
    with ModelFile.open(storyteller()) as model:
        spec = spec_of(model)
        assert (spec.layers, spec.heads, spec.kv_heads, spec.vocab_size) == (6, 8, 4, 839)
        assert not spec.tied_output


def test_small_model_reads_back(tmp_path: Path) -> None:
    assert read(tmp_path) == SMALL


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (SmallLlama(tied=True), {"tied_output": True}),
        (SmallLlama(qkv_bias=True), {"qkv_bias": True}),
        (SmallLlama(attn_output_bias=True, ffn_bias=True), {"attn_output_bias": True, "ffn_bias": True}),
        (SmallLlama(kv_heads=4), {"kv_heads": 4}),
        (SmallLlama(head_dim=32), {"head_dim": 32, "rope": replace(ROPE, dim=32)}),
        (SmallLlama(rope_base=500000.0), {"rope": replace(ROPE, base=500000.0)}),
        (SmallLlama(linear_factor=4.0), {"rope": replace(ROPE, scaling="linear", factor=4.0)}),
        (SmallLlama(freq_factors=True), {"rope": replace(ROPE, freq_factors="rope_freqs.weight")}),
        (SmallLlama(type="F16"), {}),
        (SmallLlama(type="Q8_0"), {}),
        (SmallLlama(type="BF16"), {}),
    ],
)
def test_option_of_the_family_is_read(tmp_path: Path, shape: SmallLlama, expected: dict[str, Any]) -> None:
    assert read(tmp_path, shape) == replace(SMALL, **expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention__key_length": None, "attention__value_length": None}, {}),
        ({"rope__dimension_count": None, "rope__freq_base": None, "vocab_size": None}, {}),
        ({"vocab_size": 7}, {}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 8.0}, {}),
        ({"rope__scale_linear": 2.0}, {"rope": replace(ROPE, scaling="linear", factor=2.0)}),
        ({"rope__scaling__factor": 2.0}, {"rope": replace(ROPE, scaling="linear", factor=2.0)}),
        ({"expert_count": 0}, {}),
        ({"attention__causal": True}, {}),
    ],
)
def test_key_may_be_left_out_or_have_its_older_name(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read(tmp_path, **changes) == replace(SMALL, **expected)


def test_all_heads_have_their_own_keys_where_none_are_counted(tmp_path: Path) -> None:
    assert read(tmp_path, SmallLlama(kv_heads=4), attention__head_count_kv=None) == replace(SMALL, kv_heads=4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"expert_count": 8}, "llama.expert_count: 8 experts"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "rope.scaling.type: 'yarn'"),
        ({"rope__scaling__type": "longrope"}, "longrope"),
        ({"rope__scaling__attn_factor": 1.2}, "attn_factor"),
        ({"rope__dimension_count": 8}, "8 of a head's 16 values turn"),
        ({"attention__value_length": 8}, "8 beside keys of 16"),
        ({"attention__causal": False}, "attention.causal"),
        ({"attention__head_count_kv": [2, 2]}, "has a value for each layer"),
        ({"feed_forward_length": [96, 96]}, "has a value for each layer"),
    ],
)
def test_option_that_would_change_the_result_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block_count": None}, "the key llama.block_count is missing"),
        ({"block_count": 0}, "llama.block_count is 0"),
        ({"block_count": 4_000_000_000}, "llama.block_count is 4000000000"),
        ({"block_count": "2"}, "llama.block_count is of type STRING, expected an integer"),
        ({"embedding_length": 1 << 31}, "llama.embedding_length"),
        ({"embedding_length": None}, "llama.embedding_length is missing"),
        ({"attention__head_count": 0}, "llama.attention.head_count is 0"),
        ({"attention__head_count": 6, "attention__key_length": None}, "6 heads do not divide"),
        ({"attention__head_count_kv": 3}, "4 heads cannot share 3"),
        ({"attention__head_count_kv": 0}, "head_count_kv is 0"),
        ({"attention__key_length": 15}, "15 values cannot turn in pairs"),
        ({"feed_forward_length": None}, "feed_forward_length is missing"),
        ({"context_length": 0}, "context_length is 0"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"attention__layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
        ({"attention__layer_norm_rms_epsilon": 1}, "expected a floating-point number"),
        ({"rope__freq_base": 0.0}, "freq_base is 0.0"),
        ({"rope__freq_base": float("inf")}, "freq_base is inf"),
        ({"rope__scaling__factor": -2.0}, "scaling.factor is -2.0"),
    ],
)
def test_value_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidModel, match=problem):
        read(tmp_path, **changes)


F32 = np.float32
MISSING_BIAS = {"blk.0.attn_q.bias": np.zeros(64, F32)}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"blk.1.attn_k.weight": None}, "the tensor blk.1.attn_k.weight is missing$"),
        ({"output_norm.weight": None}, "the tensor output_norm.weight is missing$"),
        ({"token_embd.weight": None}, "the tensor token_embd.weight is missing$"),
        (MISSING_BIAS, "blk.1.attn_q.bias is missing, though others"),
        ({"blk.0.attn_k.weight": np.zeros((64, 32), F32)}, r"has the shape \[32, 64\], expected \[64, 32\]"),
        ({"token_embd.weight": np.zeros((287, 64), F32)}, r"token_embd.weight has the shape \[64, 287\]"),
        ({"output.weight": np.zeros((2, 288, 64), F32)}, r"output.weight has the shape \[64, 288, 2\]"),
        ({"rope_freqs.weight": np.ones(16, F32)}, r"rope_freqs.weight has the shape \[16\], expected \[8\]"),
        ({"blk.1.ffn_norm.weight": np.ones(32, F32)}, r"ffn_norm.weight has the shape \[32\]"),
    ],
)
def test_missing_or_misshapen_tensor_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any] | None], problem: str
) -> None:
    with pytest.raises(InvalidModel, match=problem):
        read(tmp_path, tensors=tensors)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "blk.2.attn_q.weight", "blk.0.attn_q.scale", "x"])
def test_tensor_that_the_graph_would_leave_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"1 tensors are not of a llama model of 2 layers: {name}$"):
        read(tmp_path, tensors={name: np.zeros((64, 64), F32)})


def test_trailing_dimension_of_one_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, tensors={"output_norm.weight": np.ones((1, 64), F32)}) == SMALL


@pytest.mark.parametrize(
    ("name", "number", "type_name"),
    [("output_norm.weight", 30, "BF16"), ("blk.0.attn_q.weight", 26, "I32"), ("token_embd.weight", 9, "Q8_1")],
)
def test_type_on_which_ggml_would_abort_is_refused(tmp_path: Path, name: str, number: int, type_name: str) -> None:
    path = write_small_llama(tmp_path / "m.gguf", SmallLlama())
    data = bytearray(path.read_bytes())
    with ModelFile.open(path) as model:
        dims = len(model.tensors[name].shape)
    at = data.index(name.encode()) + len(name) + 4 + 8 * dims  # the type follows the dimensions
    data[at] = number
    with pytest.raises(UnsupportedModel, match=f"the tensor {name} is of type {type_name}"):
        spec_of(ModelFile.from_header(bytes(data), "m.gguf", len(data)))


def test_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", SmallLlama())
    data = path.read_bytes().replace(b"llama", b"lemma", 2)
    with pytest.raises(UnsupportedModel, match="architecture 'lemma' is not supported; supported: llama"):
        spec_of(ModelFile.from_header(data, "m.gguf", len(data)))


def test_every_size_in_a_tensor_table_is_one_that_specs_have() -> None:
    for family in FAMILIES.values():
        for name, role in family.tensors.items():
            assert name == role.role and set(role.shape) <= set(SMALL.sizes)
            assert 1 <= len(role.shape) <= 2
