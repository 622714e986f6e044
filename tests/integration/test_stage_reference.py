"""A whole model's logits and greedy tokens are llama.cpp's: bit for bit where both run the same kernels."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.shapes import Shape, write_model
from eldric.engine.ggml.library import find_library
from tests.llama_reference import LlamaReference
from tests.models import SmallLlama, smollm2, storyteller, write_small_llama
from tests.stages import Chain, random_prompt

SMALL = Shape(layers=3, hidden=256, heads=8, kv_heads=2, ffn=512, vocab=512, context=1024)
TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q3_k", "q4_k_m", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_linear_factor": 4.0},
    "frequency-factors": {"freq_factors": True},
    "tied": {"tied": True},
    "no-groups": {"kv_heads": 8},
    "one-kv-head": {"kv_heads": 1},
    "rope-base": {"rope_base": 500000.0},
}
# Other kernels than the reference's: 8-bit activations round the other way here and there, and layers add that up.
TOLERANCE = 0.25  # of the logits' standard deviation


def write_cases(folder: Path) -> list[dict[str, Any]]:
    """Prompts end just before 256 or 512 positions, so that what follows crosses; chunks are below and above the 64
    rows from which attention has another kernel."""

    def case(path: Path, vocab: int, length: int, chunk: int, count: int = 12) -> dict[str, Any]:
        options = {"chunk": chunk, "slots": 1, "weights": "repacked"}
        return {"path": str(path), "prompt": random_prompt(vocab, length), "count": count, "options": options}

    cases = []
    for index, name in enumerate(TYPES):
        path = write_model(folder / f"{name}.gguf", SMALL, name)
        cases.append(case(path, SMALL.vocab, 250, 96 if index % 2 else 32))
    for name, options in OPTIONS.items():
        path = write_model(folder / f"{name}.gguf", dataclasses.replace(SMALL, **options), "q8_0")
        cases.append(case(path, SMALL.vocab, 120, 48))
    biases = SmallLlama(qkv_bias=True, attn_output_bias=True, ffn_bias=True)
    cases.append(case(write_small_llama(folder / "biases.gguf", biases), biases.vocab, 100, 100))
    cases.append(case(storyteller(), 839, 505, 64, 24))
    cases.append(case(smollm2(), 49152, 36, 32, 8))
    return cases


def reference_variant(folder: Path) -> Path | None:
    """A folder with the one CPU variant that libllama was built for, or None where it has none of its own."""
    usual = find_library().folder
    variant = usual / "libggml-cpu-haswell.so"
    if platform.machine() != "x86_64" or not variant.exists():
        return None
    folder.mkdir()
    for path in (usual / "libggml-base.so", usual / "libggml.so", variant):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.model
def test_logits_and_greedy_tokens_are_those_of_llama_cpp_bit_for_bit(tmp_path: Path) -> None:
    variant = reference_variant(tmp_path / "ggml")
    if variant is None:
        pytest.skip("no CPU variant of this platform has the kernels that the reference has")
    cases = write_cases(tmp_path)
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.stage_against_llama", str(path)]
    environment = {**os.environ, "ELDRIC_GGML_DIR": str(variant)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    differing = {Path(case["path"]).stem: found for case, found in zip(cases, results, strict=True) if not same(found)}
    assert len(results) == len(cases) and not differing


def same(found: dict[str, Any]) -> bool:
    return bool(found["same_tokens"]) and found["largest_difference"] == 0 and found["deviation"] > 0.5


@pytest.mark.model
@pytest.mark.parametrize("name", ["storyteller", "smollm2", *TYPES])
def test_best_variant_and_layouts_stay_close_to_llama_cpp(tmp_path: Path, name: str) -> None:
    """On this machine's own kernels: logits within the tolerance, greedy tokens the same but for near ties."""
    real: dict[str, Callable[[], Path]] = {"storyteller": storyteller, "smollm2": smollm2}
    path = real[name]() if name in real else write_model(tmp_path / "model.gguf", SMALL, name)
    with Chain(path, slots=1) as chain:
        prompt = random_prompt(chain.spec.vocab_size, 40)
        with LlamaReference(path, 512) as reference:
            tokens, expected = reference.greedy(prompt, 8, chunk=chain.chunk)
        logits = chain.forced(prompt, tokens)
    difference = np.abs(logits - expected)
    assert difference.max() < TOLERANCE * expected.std()
    for index, token in enumerate(tokens):
        chosen = int(logits[index].argmax())
        gap = expected[index, token] - expected[index, chosen]
        assert gap <= 2 * difference[index].max(), f"token {index}: {chosen} instead of {token}, {gap:.3f} below it"


def test_neox_rope_is_norm_rope_with_its_pairs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotating pairs (i, i + dim/2) of reordered queries and keys is rotating pairs (2i, 2i+1) of the original ones."""
    model = SmallLlama()
    order = np.arange(model.head_dim).reshape(-1, 2).T.reshape(-1)  # 0, 2, 4 ... 1, 3, 5 ...
    reordered = {}
    for name, weights in model.tensors().items():
        if "attn_q" in name or "attn_k" in name:
            heads = weights.reshape(-1, model.head_dim, model.hidden)
            reordered[name] = np.ascontiguousarray(heads[:, order]).reshape(weights.shape)
    prompt = random_prompt(model.vocab, 40)
    with Chain(write_small_llama(tmp_path / "norm.gguf", model)) as chain:
        expected = chain.prefill(0, prompt)
        spec = chain.spec
    neox = dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, kind="neox"))
    monkeypatch.setattr("eldric.engine.stage.spec_of", lambda model: neox)
    with Chain(write_small_llama(tmp_path / "neox.gguf", model, tensors=reordered)) as chain:
        np.testing.assert_allclose(chain.prefill(0, prompt), expected, atol=0.01)
        monkeypatch.setattr("eldric.engine.stage.spec_of", lambda model: spec)
    with Chain(tmp_path / "neox.gguf") as wrong:
        assert np.abs(wrong.prefill(0, prompt) - expected).max() > 0.3
