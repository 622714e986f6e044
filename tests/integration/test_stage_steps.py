"""What a stage takes, gives and refuses, step by step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldric.engine.errors import InvalidLayers, InvalidStep
from eldric.engine.gguf import ModelFile
from eldric.engine.kernels.compiler import largest_kernel
from eldric.engine.shard import LayerRange
from eldric.engine.stage import Stage, StageConfig
from eldric.engine.step import Run, StepInput
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stages import Chain, random_prompt

VOCAB = 839
ALL = LayerRange(0, 6)


def load(layers: LayerRange = ALL, **options: Any) -> Stage:
    sizes: dict[str, Any] = {"context": 96, "slots": 4, "chunk": 16, "lane_slots": 2} | options
    with ModelFile.open(storyteller()) as model:
        return Stage.load(model, StageConfig(layers=layers, **sizes))


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.array(random_prompt(VOCAB, count, seed), np.int32)


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with load() as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Stage:
    for slot in range(shared.config.slots):
        shared.truncate(slot, 0)
    return shared


def test_any_mixture_of_runs_gives_what_each_run_gives_by_itself(stage: Stage) -> None:
    """Two chunks, four single tokens over lanes of two, some without logits, in one step."""
    with load(slots=8) as stage:
        for slot in range(4):
            stage.compute(StepInput((Run(slot, 0, 5, False),), tokens(5, slot)))
        runs = [Run(0, 5, 1, True), Run(4, 0, 7, True), Run(1, 5, 1, False), Run(2, 5, 1, True), Run(5, 0, 16, False)]
        runs.append(Run(3, 5, 1, True))
        ids = tokens(sum(run.count for run in runs), 9)
        mixed = stage.compute(StepInput(tuple(runs), ids)).logits
        assert mixed is not None and mixed.shape == (4, VOCAB)
        assert [stage.held(slot) for slot in range(6)] == [6, 6, 6, 6, 7, 16]
        start, single = 0, []
        for run in runs:
            stage.truncate(run.slot, run.position)
            logits = stage.compute(StepInput((run,), ids[start : start + run.count])).logits
            assert (logits is not None) == run.logits
            single += [] if logits is None else [logits[0].copy()]
            start += run.count
        np.testing.assert_allclose(mixed, single, atol=0.05)


def test_mixture_in_a_stage_behind_the_head_keeps_the_order_of_rows() -> None:
    hidden = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
    runs = (Run(2, 0, 1, True), Run(0, 0, 4, True), Run(3, 0, 1, True), Run(1, 0, 3, True))
    with load(LayerRange(2, 4), exact=True) as stage:
        mixed = stage.compute(StepInput(runs, hidden=hidden)).hidden
        assert mixed is not None and mixed.shape == (9, 256)
        mixed, start = mixed.copy(), 0
        for run in runs:
            alone = stage.compute(StepInput((run,), hidden=hidden[start : start + run.count])).hidden
            np.testing.assert_array_equal(mixed[start : start + run.count], alone)
            start += run.count


def test_logits_only_for_the_runs_that_want_them(stage: Stage) -> None:
    runs = (Run(0, 0, 1, False), Run(1, 0, 1, True))
    output = stage.compute(StepInput(runs, tokens(2)))
    assert output.hidden is None and output.logits is not None and output.logits.shape == (1, VOCAB)
    both = stage.compute(StepInput(tuple(run._replace(logits=True) for run in runs), tokens(2))).logits
    assert both is not None and both.shape == (2, VOCAB)
    assert stage.compute(StepInput((Run(0, 0, 8, False),), tokens(8))).logits is None


def test_going_back_forgets_what_lies_behind(stage: Stage) -> None:
    text = tokens(14)
    stage.compute(StepInput((Run(0, 0, 14, False),), text))
    stage.compute(StepInput((Run(0, 6, 4, False),), tokens(4, 1)))
    assert stage.held(0) == 10
    stage.truncate(0, 6)
    assert stage.held(0) == 6
    stage.truncate(0, 90)
    assert stage.held(0) == 6
    again = stage.compute(StepInput((Run(0, 6, 8, True),), text[6:])).logits
    assert again is not None
    again = again.copy()
    stage.compute(StepInput((Run(1, 0, 6, False),), text[:6]))
    fresh = stage.compute(StepInput((Run(1, 6, 8, True),), text[6:])).logits
    np.testing.assert_array_equal(again, fresh)


def test_slots_do_not_touch_each_other_up_to_the_last_cell(stage: Stage) -> None:
    """A slot's last position, padded chunks at its end, and the neighbours' cells."""
    text = tokens(96)
    expected = []
    for slot in (0, 1, 2):
        for start in (*range(0, 80, 16), 80):
            logits = stage.compute(
                StepInput(
                    (Run(slot, start, 15 if start == 80 else 16, True),),
                    text[start:95] if start == 80 else text[start : start + 16],
                )
            ).logits
        assert logits is not None
        expected.append(logits.copy())
    np.testing.assert_array_equal(expected[0], expected[1])
    for slot in (1, 0, 2):
        last = stage.compute(StepInput((Run(slot, 95, 1, True),), text[95:])).logits
        assert last is not None and stage.held(slot) == 96
        expected.append(last.copy())
    np.testing.assert_array_equal(expected[3], expected[4])
    np.testing.assert_array_equal(expected[3], expected[5])


@pytest.mark.parametrize(
    ("runs", "ids", "message"),
    [
        ((), tokens(0), "needs one run or more"),
        ((Run(4, 0, 1, True),), tokens(1), "slot 4 is not among the 4"),
        ((Run(-1, 0, 1, True),), tokens(1), "slot -1"),
        ((Run(0, 0, 0, True),), tokens(0), "a run of 0 tokens"),
        ((Run(0, 0, 17, True),), tokens(17), "a run of 17 tokens is not of 1 to 16"),
        ((Run(0, 1, 1, True),), tokens(1), "position 1 is not within the 0"),
        ((Run(0, -1, 1, True),), tokens(1), "position -1"),
        ((Run(0, 0, 1, True), Run(0, 0, 1, True)), tokens(2), "of different slots"),
        ((Run(0, 0, 2, True),), tokens(3), r"token ids are int32 \(3,\), expected int32 \(2,\)"),
        ((Run(0, 0, 2, True),), tokens(2).astype(np.int64), "token ids are int64"),
        ((Run(0, 0, 2, True),), np.array([0, VOCAB], np.int32), "within the vocabulary of 839"),
        ((Run(0, 0, 2, True),), np.array([-1, 0], np.int32), "within the vocabulary of 839"),
        ((Run(0, 0, 1, True),), None, "the head takes token ids"),
    ],
)
def test_step_that_breaks_a_bound_is_refused_and_changes_nothing(
    stage: Stage, runs: tuple[Run, ...], ids: np.ndarray | None, message: str
) -> None:
    stage.compute(StepInput((Run(3, 0, 4, False),), tokens(4)))
    with pytest.raises(InvalidStep, match=message):
        stage.compute(StepInput(runs, ids))
    assert [stage.held(slot) for slot in range(4)] == [0, 0, 0, 4]


def test_closed_stage_refuses_steps_and_holds_nothing() -> None:
    stage = load()
    stage.compute(StepInput((Run(0, 0, 1, True),), tokens(1)))
    stage.close()
    stage.close()
    with pytest.raises(InvalidStep, match="the stage is closed"):
        stage.compute(StepInput((Run(0, 0, 1, True),), tokens(1)))
    assert stage.memory.total == 0


def test_more_shapes_than_graphs_are_kept() -> None:
    """Chunks and decode steps of all sizes, twice: what is built again computes what it computed before."""
    with load(slots=4, lane_slots=4, chunk=24, weights="mapped") as stage:
        stage._model._graphs._limit = 3
        seen: dict[tuple[int, int], np.ndarray] = {}
        for count, rows in [*((count, 1) for count in range(1, 25)), *((1, rows) for rows in range(1, 5))] * 2:
            runs = tuple(Run(slot, 0, count, True) for slot in range(rows))
            logits = stage.compute(StepInput(runs, tokens(count * rows))).logits
            assert logits is not None
            expected = seen.setdefault((count, rows), logits.copy())
            np.testing.assert_array_equal(logits, expected)


def test_positions_beyond_the_context_are_refused(stage: Stage) -> None:
    for start in range(0, 96, 16):
        stage.compute(StepInput((Run(0, start, 16, False),), tokens(16)))
    with pytest.raises(InvalidStep, match="position 96 is beyond the context of 96"):
        stage.compute(StepInput((Run(0, 96, 1, True),), tokens(1)))


def test_hidden_states_are_held_against_the_model() -> None:
    with load(LayerRange(3, 6)) as stage:
        run = (Run(0, 0, 2, True),)
        cases: list[tuple[Any, str]] = [
            (None, "behind the head takes hidden states"),
            (np.zeros((2, 255), np.float32), r"float32 \(2, 255\), expected float32 \(2, 256\)"),
            (np.zeros((2, 256)), "float64"),
        ]
        for hidden, message in cases:
            with pytest.raises(InvalidStep, match=message):
                stage.compute(StepInput(run, hidden=hidden))
        with pytest.raises(InvalidStep, match="takes hidden states"):
            stage.compute(StepInput(run, tokens(2)))


def test_unknown_slots_and_positions_are_refused_everywhere(stage: Stage) -> None:
    for call in (lambda: stage.held(4), lambda: stage.truncate(-1, 0), lambda: stage.truncate(0, -1)):
        with pytest.raises(InvalidStep):
            call()


@pytest.mark.parametrize("field", ["context", "slots", "chunk", "lane_slots"])
@pytest.mark.parametrize("value", [0, -1, 1 << 40])
def test_sizes_out_of_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidStep, match=f"{field} is {value}"):
        load(ALL, **{field: value})


def test_layers_outside_of_the_model_are_refused() -> None:
    with pytest.raises(InvalidLayers):
        load(LayerRange(3, 7))


def test_infinities_and_not_a_number_stay_in_their_own_sequence() -> None:
    """What a peer sends may be anything; another sequence's next step must not show it."""
    with load(LayerRange(3, 6), exact=True) as stage:
        good = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
        expected = stage.compute(StepInput((Run(0, 0, 2, True),), hidden=good)).logits
        assert expected is not None
        expected = expected.copy()
        bad = np.full((16, 256), np.nan, np.float32)
        bad[:, ::2] = np.inf
        stage.compute(StepInput((Run(1, 0, 16, True),), hidden=bad))
        stage.compute(StepInput((Run(1, 16, 1, True), Run(2, 0, 1, True)), hidden=bad[:2]))
        again = stage.compute(StepInput((Run(0, 0, 2, True),), hidden=good)).logits
        np.testing.assert_array_equal(again, expected)


def test_kv_cache_in_f32_agrees_with_f16() -> None:
    prompt = random_prompt(VOCAB, 40)
    with Chain(storyteller()) as half, Chain(storyteller(), kv_type="f32") as full:
        assert full.stages[0].memory.kv == pytest.approx(2 * half.stages[0].memory.kv, rel=0.01)
        np.testing.assert_allclose(half.prefill(0, prompt), full.prefill(0, prompt), atol=0.1)


def test_a_stage_of_one_layer_slot_and_token() -> None:
    with load(LayerRange(0, 1), context=2, slots=1, chunk=1, lane_slots=1) as stage:
        hidden = stage.compute(StepInput((Run(0, 0, 1, True),), tokens(1))).hidden
        assert hidden is not None and hidden.shape == (1, 256)
        stage.compute(StepInput((Run(0, 1, 1, True),), tokens(1)))
        with pytest.raises(InvalidStep):
            stage.compute(StepInput((Run(0, 2, 1, True),), tokens(1)))


def test_small_blocks_that_do_not_fill_a_vector_unit(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "odd.gguf", SmallLlama(hidden=36, heads=3, kv_heads=1, head_dim=10, ffn=50))
    with Chain(path) as chain:
        logits = chain.greedy(random_prompt(288, 40), 4)[1]
    assert np.isfinite(logits).all()


@pytest.mark.skipif(largest_kernel() is None, reason="no kernels for this processor")
def test_likeliest_token_of_each_row_of_logits_comes_along() -> None:
    with load(lane_slots=4) as stage:
        seen = []
        for slot in range(4):
            seen.append(stage.compute(StepInput((Run(slot, 0, 5, slot != 2),), tokens(5, slot))))
            if slot == 2:
                assert seen[-1].likeliest is None and seen[-1].logits is None
            else:
                assert seen[-1].logits is not None and seen[-1].likeliest == seen[-1].logits.argmax(axis=1).tolist()
        runs = tuple(Run(slot, 5, 1, slot != 1) for slot in range(4))
        output = stage.compute(StepInput(runs, tokens(4)))
        assert output.logits is not None and len(output.logits) == 3
        assert output.likeliest == output.logits.argmax(axis=1).tolist()
