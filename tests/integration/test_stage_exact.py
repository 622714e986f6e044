"""Exact mode: what a sequence computes does not depend on what is computed beside it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.shapes import Shape, write_model
from eldric.engine.ggml.library import find_library
from eldric.engine.ggml.policy import AMX, MAPPED, REPACK, exact_rows
from eldric.engine.kernels.compiler import largest_kernel
from eldric.engine.stage import Logits
from eldric.engine.step import Run
from eldric.engine.tensor_types import TensorType
from tests.models import storyteller
from tests.stages import Chain, random_prompt

SHAPE = Shape(layers=1, hidden=256, heads=8, kv_heads=2, ffn=512, vocab=384, context=1024)
LENGTHS = (3, 31, 32, 33, 64, 100, 255, 257, 40, 41, 7, 509, 60, 16, 17, 90)
SEQUENCES = len(LENGTHS)


def prompts(vocab_size: int) -> list[list[int]]:
    return [random_prompt(vocab_size, length, seed) for seed, length in enumerate(LENGTHS)]


def greedy_alone(chain: Chain, count: int) -> list[Logits]:
    return [chain.greedy(prompt, count, slot=3)[1] for prompt in prompts(chain.spec.vocab_size)]


def greedy_together(chain: Chain, count: int) -> list[Logits]:
    """All sequences at once: chunks of the prompts in turn, then one step for all of them per token."""
    texts = prompts(chain.spec.vocab_size)
    rows: list[list[Logits]] = [[] for _ in texts]
    for start in range(0, max(LENGTHS), chain.chunk):
        for slot, prompt in enumerate(texts):
            if start < len(prompt):
                stop = min(start + chain.chunk, len(prompt))
                logits = chain.step([Run(slot, start, stop - start, stop == len(prompt))], prompt[start:stop])
                if logits is not None:
                    rows[slot].append(logits[0])
    for index in range(count - 1):
        step = {slot: (LENGTHS[slot] + index, int(rows[slot][-1].argmax())) for slot in range(SEQUENCES)}
        for slot, logits_row in chain.decode(step).items():
            rows[slot].append(logits_row)
    return [np.stack(found) for found in rows]


LAYOUTS = [*itertools.product(("q4_k_m", "q4_0", "q8_0", "f16"), ("auto", "mapped"), (1,)), ("q4_k_m", "repacked", 1)]
LAYOUTS += [(quant, "auto", 1) for quant in ("q2_k", "q3_k", "iq4_xs")]


@pytest.mark.parametrize(("quant", "weights", "threads"), [*LAYOUTS, ("q4_0", "auto", 2), ("f16", "auto", 2)])
def test_sixteen_sequences_at_once_compute_what_each_computes_alone(
    tmp_path: Path, quant: str, weights: str, threads: int
) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPE, quant)
    sizes: dict[str, Any] = {"slots": SEQUENCES, "lane_slots": SEQUENCES, "context": 640}
    with Chain(path, exact=True, threads=threads, weights=weights, **sizes) as chain:
        alone = greedy_alone(chain, 5)
        together = greedy_together(chain, 5)
    for slot, (expected, found) in enumerate(zip(alone, together, strict=True)):
        np.testing.assert_array_equal(found, expected, err_msg=f"sequence of {LENGTHS[slot]} tokens")
    assert len({row.tobytes() for row in np.concatenate(alone)}) == 5 * SEQUENCES


@pytest.mark.model
def test_logits_do_not_depend_on_lanes_or_split() -> None:
    sizes: dict[str, Any] = {"slots": SEQUENCES, "context": 640, "exact": True}
    found = []
    for cuts, lane_slots in (((), 16), ((2, 4), 5)):
        with Chain(storyteller(), cuts, lane_slots=lane_slots, **sizes) as chain:
            for slot, prompt in enumerate(prompts(chain.spec.vocab_size)):
                chain.prefill(slot, prompt[:20])
            rows = {slot: (min(20, LENGTHS[slot]), slot + 3) for slot in range(SEQUENCES)}
            found.append(np.stack(list(chain.decode(rows).values())))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.skipif(largest_kernel() is None, reason="no kernels for this processor")
@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m", "q8_0"])
def test_the_engines_own_kernels_give_the_same_bits_whatever_the_chunks(tmp_path: Path, quant: str) -> None:
    """Even a prompt that is taken token by token."""
    path, found = write_model(tmp_path / "model.gguf", SHAPE, quant), []
    prompt = random_prompt(SHAPE.vocab, 150)
    for chunk, threads in ((64, 1), (64, 2), (17, 1), (150, 1), (1, 1)):
        with Chain(path, chunk=chunk, threads=threads, exact=threads > 1) as chain:
            found.append(np.concatenate([chain.prefill(1, prompt), chain.greedy(prompt, 4, slot=2)[1]]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_the_bound_is_that_of_the_worst_matrix(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPE, "q4_k_m")
    with Chain(path, exact=True, weights="mapped", slots=16, lane_slots=16) as chain:
        assert chain.stages[0].exact_rows() == 7
    assert exact_rows(TensorType.Q4_K, REPACK).most == 3
    assert exact_rows(TensorType.Q4_K, AMX).most >= 16
    assert exact_rows(TensorType.Q4_0, MAPPED).most >= 16
    assert exact_rows(TensorType.IQ1_S, "a layout that nobody tried").most == 1


@pytest.mark.parametrize(("lane_slots", "exact"), [(7, True), (8, False)])
def test_exact_mode_is_left_out_where_steps_would_have_to_be_divided(
    tmp_path: Path, lane_slots: int, exact: bool
) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPE, "q4_k_m")
    with Chain(path, exact=None, weights="mapped", slots=16, lane_slots=lane_slots) as chain:
        assert chain.stages[0].exact is exact


@pytest.mark.parametrize(("weights", "exact"), [("auto", True), ("mapped", False)])
def test_exact_mode_is_left_out_where_a_single_row_would_have_to_be_padded(
    tmp_path: Path, weights: str, exact: bool
) -> None:
    if weights == "auto" and largest_kernel() is None:
        pytest.skip("no kernels of the engine's own for this processor")
    path = write_model(tmp_path / "model.gguf", SHAPE, "f16")
    with Chain(path, exact=None, weights=weights) as chain:
        assert chain.stages[0].exact is exact


def test_default_mode_is_not_exact_for_mapped_k_quants(tmp_path: Path) -> None:
    """The comparison above can fail: outside of exact mode, other kernels give other bits."""
    path = write_model(tmp_path / "model.gguf", SHAPE, "q4_k_m")
    sizes: dict[str, Any] = {"slots": SEQUENCES, "lane_slots": SEQUENCES, "context": 640, "weights": "mapped"}
    with Chain(path, **sizes) as chain:
        pairs = list(zip(greedy_alone(chain, 2), greedy_together(chain, 2), strict=True))
    if find_library().cpu_variant in ("x64", "sse42", "sandybridge", "ivybridge", "piledriver"):
        pytest.skip("this CPU variant has one kernel for all numbers of rows")
    assert any((expected != found).any() for expected, found in pairs)
