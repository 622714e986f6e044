"""The tail's samplers and embeddings: of each slot, for as long as a sequence holds it."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from eldric.engine.errors import InvalidSampling
from eldric.engine.stage import StepOutput
from eldric.engine.step import Run
from eldric.v1 import frame_pb2, sampling_pb2
from eldric.worker.tail import Tail

VOCAB = 8
FINAL = np.array([0.5, -2.0, 1.0], np.float32)


def opened(slot: int, **sampling: float) -> frame_pb2.SequenceOpen:
    return frame_pb2.SequenceOpen(slot=slot, sampling=sampling_pb2.SamplingParams(**{"temperature": 0.0, **sampling}))  # type: ignore[arg-type]


def logits(*best: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rows = np.zeros((len(best), VOCAB), np.float32)
    rows[range(len(best)), best] = 5.0
    return rows


def answered(
    tail: Tail, runs: Sequence[Run], rows: NDArray[np.float32] | None, likeliest: list[int] | None = None
) -> frame_pb2.StepTokens:
    return tail.answer(runs, StepOutput(None, rows, likeliest), lambda: FINAL)


def test_each_run_with_logits_gets_its_slots_token() -> None:
    tail = Tail(2, VOCAB)
    for slot in (0, 1, 2):
        tail.open(opened(slot))
    runs = [Run(2, 4, 1, True), Run(0, 0, 3, False), Run(1, 9, 1, True)]
    answer = answered(tail, runs, logits(6, 3))
    assert [(token.slot, token.token) for token in answer.tokens] == [(2, 6), (1, 3)]
    assert not any(token.HasField("logprob") for token in answer.tokens)


def test_a_step_without_logits_gives_no_token() -> None:
    tail = Tail(2, VOCAB)
    tail.open(opened(0))
    assert not answered(tail, [Run(0, 0, 3, False)], None).tokens


def test_a_closed_slot_gives_no_token_but_takes_its_row() -> None:
    tail = Tail(2, VOCAB)
    tail.open(opened(0))
    tail.open(opened(1))
    tail.close(0)
    tail.close(5)
    answer = answered(tail, [Run(0, 4, 1, True), Run(1, 4, 1, True)], logits(6, 3))
    assert [(token.slot, token.token) for token in answer.tokens] == [(1, 3)]


def test_logprobs_come_best_first() -> None:
    tail = Tail(2, VOCAB)
    tail.open(opened(0, logprobs=3))
    (token,) = answered(tail, [Run(0, 4, 1, True)], logits(6)).tokens
    assert token.top_tokens[0] == token.token == 6 and len(token.top_tokens) == len(token.top_logprobs) == 3
    assert token.logprob < 0 and token.logprob == pytest.approx(token.top_logprobs[0])
    assert list(token.top_logprobs) == sorted(token.top_logprobs, reverse=True)


def test_penalties_count_the_prompt() -> None:
    tail = Tail(2, VOCAB)
    message = opened(0, presence_penalty=8.0)
    message.prompt.append(6)
    tail.open(message)
    (token,) = answered(tail, [Run(0, 4, 1, True)], logits(6)).tokens
    assert token.token != 6


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    def draw(seed: int, position: int, slot: int) -> int:
        tail = Tail(2, VOCAB)
        tail.open(opened(slot, temperature=1.0, seed=seed))
        rows = np.zeros((1, VOCAB), np.float32)
        return answered(tail, [Run(slot, position, 1, True)], rows).tokens[0].token

    assert [draw(1, position, 0) for position in range(20)] == [draw(1, position, 3) for position in range(20)]
    assert len({tuple(draw(seed, position, 0) for position in range(20)) for seed in range(4)}) == 4


def test_an_unsound_sampling_is_refused() -> None:
    with pytest.raises(InvalidSampling, match="logit_bias"):
        Tail(2, VOCAB).open(
            frame_pb2.SequenceOpen(slot=0, sampling=sampling_pb2.SamplingParams(logit_bias={VOCAB: 1.0}))
        )


def test_a_token_that_was_found_to_be_the_likeliest_is_taken_where_nothing_else_is_asked() -> None:
    tail = Tail(2, VOCAB)
    tail.open(opened(0))
    tail.open(opened(1, logprobs=1))
    tail.open(opened(2, presence_penalty=8.0))
    runs = [Run(slot, 4, 1, True) for slot in range(3)]
    answer = answered(tail, runs, logits(6, 6, 6), [5, 5, 5])
    assert [token.token for token in answer.tokens] == [5, 6, 6]


def test_a_row_that_is_no_number_fails_its_own_slot_alone() -> None:
    tail = Tail(2, VOCAB)
    for slot in range(3):
        tail.open(opened(slot))
    rows = logits(6, 6, 3)
    rows[0, 2] = np.nan
    rows[1, 6] = np.inf
    answer = answered(tail, [Run(slot, 4, 1, True) for slot in range(3)], rows, [-1, -1, 3])
    assert [(token.slot, token.token) for token in answer.tokens] == [(2, 3)]
    assert (answer.error.stage, list(answer.error.slots)) == (2, [0, 1])
    assert answer.error.status == "INTERNAL" and "largest logit is" in answer.error.message


def test_a_sequence_that_is_embedded_gets_the_last_hidden_state_once_its_prompt_is_through() -> None:
    tail = Tail(2, VOCAB)
    tail.open(frame_pb2.SequenceOpen(slot=1, embed=True))
    assert not answered(tail, [Run(1, 0, 4, False)], None).tokens
    (entry,) = answered(tail, [Run(1, 4, 3, True)], logits(6)).tokens
    assert (entry.slot, list(entry.embedding)) == (1, FINAL.tolist())


def test_a_slot_that_was_embedded_samples_for_the_next_sequence() -> None:
    tail = Tail(2, VOCAB)
    tail.open(frame_pb2.SequenceOpen(slot=0, embed=True))
    tail.close(0)
    tail.open(opened(0))
    (entry,) = answered(tail, [Run(0, 4, 1, True)], logits(6)).tokens
    assert entry.token == 6 and not entry.embedding


def test_an_embedding_that_is_no_number_fails() -> None:
    tail = Tail(2, VOCAB)
    tail.open(frame_pb2.SequenceOpen(slot=0, embed=True))
    broken = np.array([1.0, np.nan], np.float32)
    answer = tail.answer([Run(0, 0, 3, True)], StepOutput(None, logits(6)), lambda: broken)
    assert not answer.tokens and list(answer.error.slots) == [0]
    assert "embedding holds infinite or undefined" in answer.error.message
