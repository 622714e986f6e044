"""Cutting a model into stages changes nothing: same hidden states, same tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import Shape, write_model
from eldric.engine.step import Run, StepInput
from tests.models import storyteller
from tests.stages import Chain, random_prompt

EVERY_CUT = {1: (), 2: (3,), 3: (2, 4), 6: (1, 2, 3, 4, 5)}


@pytest.mark.model
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_hidden_state_at_every_cut_is_that_of_the_unsplit_model(cut: int) -> None:
    """The stages behind the cut, fed with the hidden states before it, give the unsplit model's logits, bit for bit."""
    prompt = random_prompt(839, 75)
    with Chain(storyteller()) as whole, Chain(storyteller(), [cut]) as halves, Chain(storyteller(), range(1, 6)) as six:
        for position in range(0, 75, 25):
            runs = (Run(0, position, 25, position == 50),)
            tokens = np.array(prompt[position : position + 25], np.int32)
            expected = whole.stages[0].compute(StepInput(runs, tokens))
            step = StepInput(runs, tokens)
            for stage in six.stages[:cut]:
                step = StepInput(runs, hidden=stage.compute(step).hidden)
            hidden = halves.stages[0].compute(StepInput(runs, tokens)).hidden
            assert hidden is not None and step.hidden is not None
            np.testing.assert_array_equal(hidden, step.hidden)
            assert hidden.std() > 0.1
            output = halves.stages[1].compute(StepInput(runs, hidden=hidden))
            assert (output.logits is None) == (expected.logits is None)
        assert output.logits is not None and expected.logits is not None
        np.testing.assert_array_equal(output.logits, expected.logits)


@pytest.mark.model
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_stages_in_a_row_give_the_tokens_of_one(stages: int) -> None:
    prompt = random_prompt(839, 250)
    with Chain(storyteller(), chunk=96) as whole, Chain(storyteller(), EVERY_CUT[stages], chunk=96) as chain:
        expected, logits = whole.greedy(prompt, 12)
        tokens, chained_logits = chain.greedy(prompt, 12)
    assert tokens == expected
    np.testing.assert_array_equal(chained_logits, logits)


@pytest.mark.parametrize("quant", ["f16", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("cuts", [(1,), (1, 2)])
def test_split_of_other_types_and_a_tied_output(tmp_path: Path, quant: str, cuts: Sequence[int]) -> None:
    shape = Shape(layers=3, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=320, context=512, tied=True)
    path = write_model(tmp_path / "model.gguf", shape, quant)
    prompt = random_prompt(shape.vocab, 70)
    with Chain(path) as whole, Chain(path, cuts) as chain:
        expected, logits = whole.greedy(prompt, 8)
        tokens, chained_logits = chain.greedy(prompt, 8)
    assert tokens == expected
    np.testing.assert_array_equal(chained_logits, logits)


@pytest.mark.model
def test_stages_with_other_numbers_of_threads_give_the_same_bits_in_exact_mode() -> None:
    """Past 512 positions ggml divides a single query's keys among the threads, unless told not to."""
    prompt = random_prompt(839, 505)
    results = []
    for threads in (1, 2, 3):
        with Chain(storyteller(), chunk=96, threads=threads, exact=True) as chain:
            results.append(chain.greedy(prompt, 16)[1])
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
