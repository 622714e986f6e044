"""A head's requests and answers: what is let in, and which events a caller gets."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from eldric.engine.schedule import Finish
from eldric.engine.schedule import Sequence as EngineSequence
from eldric.errors import InvalidRequest, PipelineDegraded
from eldric.v1 import frame_pb2, inference_pb2, sampling_pb2
from eldric.worker.generation import Admitted, Ended, Failed, Generation, Token
from eldric.worker.inference_service import MAX_REQUEST_ID, MAX_STOP_TOKENS, Answer, make_generation

HEAD = cast(Any, SimpleNamespace(vocab_size=100, context=16))
MS = 1_000_000


def request(ids: list[int], **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=ids), **fields)


def test_a_request_becomes_a_sequence() -> None:
    made = make_generation(request([1, 2, 99], max_tokens=5, stop_tokens=[7, 7, 8], request_id="r"), HEAD)
    sequence = made.sequence
    assert (sequence.id, sequence.prompt.tolist(), sequence.max_tokens) == ("r", [1, 2, 99], 5)
    assert sequence.prompt.dtype == np.int32 and sequence.stop_tokens == {7, 8}
    assert made.sampling.HasField("seed")
    others = {make_generation(request([1]), HEAD).sequence.id for _ in range(3)}
    assert len(others) == 3 and "" not in others


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (inference_pb2.GenerateRequest(prompt="text"), "token ids"),
        (inference_pb2.GenerateRequest(), "token ids"),
        (request([]), "empty"),
        (request([1] * 16), "16 tokens, and the context of 16"),
        (request([1, 100]), r"outside the vocabulary \[0, 100\)"),
        (request([-1]), "outside the vocabulary"),
        (request([1], stop_tokens=range(MAX_STOP_TOKENS + 1)), "stop tokens"),
        (request([1], request_id="x" * (MAX_REQUEST_ID + 1)), "request id"),
    ],
)
def test_what_can_never_run_is_refused(wrong: inference_pb2.GenerateRequest, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        make_generation(wrong, HEAD)


@pytest.fixture
def answer() -> Answer:
    sequence = EngineSequence("r", np.array([1, 2], np.int32), 4)
    return Answer(Generation(sequence, sampling_pb2.SamplingParams(), submitted_ns=10 * MS))


def token(id: int, at_ms: int, **fields: Any) -> Token:
    return Token(frame_pb2.SampledToken(token=id, **fields), at_ms * MS)


def ids(event: inference_pb2.GenerateEvent) -> list[int]:
    return [each.id for each in event.delta.tokens]


def test_tokens_that_came_together_make_one_delta_and_the_end_follows(answer: Answer) -> None:
    assert answer.started().started == inference_pb2.Started(request_id="r", prompt_tokens=2)
    assert not list(answer.events([Admitted(12 * MS)]))
    (event,) = answer.events([token(5, 20), token(6, 25)])
    assert ids(event) == [5, 6] and not answer.ended
    delta, end = answer.events([token(7, 30), Ended(Finish.STOP, 31 * MS)])
    assert ids(delta) == [7] and answer.ended
    finished = end.finished
    assert (finished.reason, finished.usage.prompt_tokens, finished.usage.completion_tokens) == (
        inference_pb2.STOP,
        2,
        3,
    )
    timings = finished.timings
    assert (timings.queue_ms, timings.prompt_ms, timings.generation_ms) == (2, 8, 11)


def test_logprobs_are_given_on(answer: Answer) -> None:
    sampled = token(5, 20, logprob=-0.5, top_tokens=[5, 6], top_logprobs=[-0.5, -1.5])
    (event,) = answer.events([sampled])
    (given,) = event.delta.tokens
    assert given.logprob == -0.5 and [(top.token, top.logprob) for top in given.top] == [(5, -0.5), (6, -1.5)]


def test_tokens_before_a_failure_are_still_delivered(answer: Answer) -> None:
    events = answer.events([Admitted(12 * MS), token(5, 20), Failed(PipelineDegraded("stage 1 is lost"))])
    assert ids(next(events)) == [5]
    with pytest.raises(PipelineDegraded, match="stage 1 is lost"):
        next(events)
    assert answer.ended


def test_a_generation_that_ends_before_its_first_token_has_no_time_for_tokens(answer: Answer) -> None:
    (end,) = answer.events([Admitted(12 * MS), Ended(Finish.CANCELLED, 15 * MS)])
    assert end.finished.reason == inference_pb2.CANCELLED
    assert (end.finished.timings.prompt_ms, end.finished.timings.generation_ms) == (3, 0)
