"""The Inference service of a head worker: token ids in, token ids out."""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np

from eldric.engine.sampling import Sampler
from eldric.engine.schedule import Sequence as EngineSequence
from eldric.errors import InvalidRequest, NotReady, NotSupported
from eldric.v1 import frame_pb2, inference_pb2, inference_pb2_grpc
from eldric.worker.convert import FINISH_REASONS, sampling_params, with_seed
from eldric.worker.generation import Admitted, Ended, Failed, Generation, Happening, Token
from eldric.worker.head import Head
from eldric.worker.stages import StageTable

MAX_STOP_TOKENS = 256
MAX_REQUEST_ID = 64


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, stages: StageTable) -> None:
        self._stages = stages

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        head = self._stages.find_head(request.model)
        generation = make_generation(request, head)
        head.submit(generation)
        answer = Answer(generation)
        try:
            yield answer.started()
            async for happenings in generation.happenings():
                for event in answer.events(happenings):
                    yield event
        finally:
            if not answer.ended:
                head.drop(generation)

    async def Embed(self, request: inference_pb2.EmbedRequest, context: object) -> inference_pb2.EmbedResponse:
        head = self._stages.find_head(request.model)
        if not head.embeds:
            raise NotSupported(
                f"the model of {request.model!r} pools its tokens for an embedding, which is not supported"
            )
        tokens = request.tokens if request.HasField("tokens") else None
        generation = make_generation(
            inference_pb2.GenerateRequest(model=request.model, tokens=tokens, max_tokens=1), head, embeds=True
        )
        head.submit(generation)
        ended, embedding = False, None
        try:
            async for happenings in generation.happenings():
                for happening in happenings:
                    match happening:
                        case Token(sampled, _):
                            embedding = np.array(sampled.embedding, np.float64)
                        case Failed(error):
                            ended = True
                            raise error
                        case Ended():
                            ended = True
        finally:
            if not ended:
                head.drop(generation)
        if embedding is None or not embedding.size:
            raise NotReady("the worker of the last stage cannot embed: update it")
        length = float(np.linalg.norm(embedding)) or 1.0
        return inference_pb2.EmbedResponse(
            embedding=(embedding / length).tolist(), prompt_tokens=len(generation.sequence.prompt)
        )

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: object) -> inference_pb2.TokenizeResponse:
        raise NotReady("workers hold no vocabulary; ask a router")

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: object
    ) -> inference_pb2.DetokenizeResponse:
        raise NotReady("workers hold no vocabulary; ask a router")

    async def Cancel(self, request: inference_pb2.CancelRequest, context: object) -> inference_pb2.CancelResponse:
        heads = [held.head for held in self._stages if held.head is not None]
        cancelled = [head.cancel(request.request_id) for head in heads]
        return inference_pb2.CancelResponse(cancelled=any(cancelled))


def make_generation(request: inference_pb2.GenerateRequest, head: Head, *, embeds: bool = False) -> Generation:
    """Check a request against its head's bounds. Raises InvalidRequest, InvalidSampling."""
    if request.WhichOneof("input") != "tokens":
        raise InvalidRequest("a head worker takes token ids; ask a router for text")
    prompt = np.array(request.tokens.ids, np.int32)
    if len(prompt) == 0:
        raise InvalidRequest("the prompt is empty")
    if len(prompt) >= head.context:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, and the context of {head.context} must hold the answer too"
        )
    if prompt.min() < 0 or prompt.max() >= head.vocab_size:
        raise InvalidRequest(f"a token id lies outside the vocabulary [0, {head.vocab_size})")
    if len(request.stop_tokens) > MAX_STOP_TOKENS or len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidRequest(f"at most {MAX_STOP_TOKENS} stop tokens, and {MAX_REQUEST_ID} characters of request id")
    sampling = with_seed(request.sampling)
    Sampler(sampling_params(sampling), head.vocab_size, ())  # what the tail will make of it must be sound
    sequence = EngineSequence(
        id=request.request_id or secrets.token_hex(8),
        prompt=prompt,
        max_tokens=request.max_tokens,
        stop_tokens=frozenset(request.stop_tokens),
        ignores_cache=request.ignore_cache,
    )
    return Generation(sequence, sampling, embeds)


class Answer:
    """Turns what happens to a generation into the events of its call."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._admitted_ns = self._first_ns = generation.submitted_ns
        self._tokens = 0
        self.ended = False

    def started(self) -> inference_pb2.GenerateEvent:
        sequence = self._generation.sequence
        started = inference_pb2.Started(request_id=sequence.id, prompt_tokens=len(sequence.prompt))
        return inference_pb2.GenerateEvent(started=started)

    def events(self, happenings: Sequence[Happening]) -> Iterator[inference_pb2.GenerateEvent]:
        """Tokens that came together make one delta. Raises the error of a generation that failed, after its tokens."""
        delta = inference_pb2.Delta()
        failure = None
        for happening in happenings:
            match happening:
                case Admitted(at_ns):
                    self._admitted_ns = at_ns
                case Token(sampled, at_ns):
                    self._first_ns = self._first_ns if self._tokens else at_ns
                    self._tokens += 1
                    delta.tokens.append(_generated(sampled))
                case Ended(_, at_ns):
                    self.ended = True
                    finished = self._finished(happening, at_ns)
                case Failed(error):
                    self.ended = True
                    failure = error
        if delta.tokens:
            yield inference_pb2.GenerateEvent(delta=delta)
        if failure is not None:
            raise failure
        if self.ended:
            yield inference_pb2.GenerateEvent(finished=finished)

    def _finished(self, ended: Ended, at_ns: int) -> inference_pb2.Finished:
        first_ns = self._first_ns if self._tokens else at_ns
        return inference_pb2.Finished(
            reason=FINISH_REASONS[ended.reason],
            usage=inference_pb2.Usage(
                prompt_tokens=len(self._generation.sequence.prompt),
                completion_tokens=self._tokens,
                cached_tokens=self._generation.sequence.reused,
            ),
            timings=inference_pb2.Timings(
                queue_ms=(self._admitted_ns - self._generation.submitted_ns) / 1e6,
                prompt_ms=(first_ns - self._admitted_ns) / 1e6,
                generation_ms=(at_ns - first_ns) / 1e6,
            ),
        )


def _generated(sampled: frame_pb2.SampledToken) -> inference_pb2.GeneratedToken:
    token = inference_pb2.GeneratedToken(id=sampled.token)
    if sampled.HasField("logprob"):
        token.logprob = sampled.logprob
        for top, logprob in zip(sampled.top_tokens, sampled.top_logprobs, strict=True):
            token.top.add(token=top, logprob=logprob)
    return token
