"""One generation: token ids go to a head, text and tokens come back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc

from eldric.channels import ChannelPool, call_errors
from eldric.engine.errors import InvalidPrompt
from eldric.engine.text_stream import TextStream
from eldric.errors import EldricError, InvalidRequest, NotFound, NotReady, NotSupported, Unavailable
from eldric.router.errors import PipelineLost, PromptTooLong
from eldric.router.metrics import ModelMetrics, RouterMetrics
from eldric.router.pipelines import Pipelines, Route
from eldric.router.prompts import Target
from eldric.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

#: A head that is alive says at once that it has taken a request.
START_TIMEOUT_S = 10.0
#: An embedding may wait for a slot as a generation may; a head that is gone is noticed by its connection, much sooner.
EMBED_TIMEOUT_S = 600.0

REASONS = {inference_pb2.STOP: "stop", inference_pb2.LENGTH: "length", inference_pb2.CANCELLED: "cancelled"}


@dataclass(frozen=True, slots=True)
class Job:
    """What one generation is to do; the fields are those of inference.proto's GenerateRequest."""

    prompt: Sequence[int]
    sampling: sampling_pb2.SamplingParams
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    ignore_cache: bool = False
    request_id: str = ""
    arrived: float = 0.0  # when the request came, time.perf_counter's seconds; 0: now


class Started(NamedTuple):
    """A head took the request."""

    request_id: str
    prompt_tokens: int
    pipeline: str


class Token(NamedTuple):
    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # ids and logprobs, the most likely first


class Delta(NamedTuple):
    """What came since the last one. Text never cuts a character and never shows a part of a stop string, so it may be
    behind the tokens: `settled` counts those, from the generation's first, whose text was given out."""

    text: str
    tokens: tuple[Token, ...]
    settled: int


class Finished(NamedTuple):
    reason: str  # "stop", "length", "cancelled"
    stop: str  # the stop string that was met
    prompt_tokens: int
    completion_tokens: int
    queue_ms: float
    prompt_ms: float
    generation_ms: float
    cached_tokens: int = 0  # of the prompt's, as far as the head told


Event = Started | Delta | Finished


class Heads:
    """Starts generations at the heads of pipelines."""

    def __init__(self, channels: ChannelPool, pipelines: Pipelines, metrics: RouterMetrics) -> None:
        self._channels = channels
        self._pipelines = pipelines
        self._metrics = metrics

    async def generate(self, target: Target, job: Job) -> AsyncGenerator[Event, None]:
        """Started, then deltas, then Finished. Closing the generator cancels the generation.

        A replica that is full, cannot be reached or is lost before it gave a token is passed over; Started names the
        first that took the request. Raises QueueIsFull when all are full, PipelineLost, and InvalidRequest for what the
        head refuses.
        """
        problems: list[EldricError] = []
        begun = delivered = False
        for route in self._pipelines.by_load(_fitting(target, len(job.prompt))):
            try:
                async with contextlib.aclosing(self._generate(route, target, job)) as events:
                    async for event in events:
                        if isinstance(event, Started) and begun:
                            continue
                        begun = True
                        delivered = delivered or isinstance(event, Delta)
                        yield event
                return
            except EldricError as error:
                if delivered or not _may_retry(error):
                    raise
                problems.append(error)
        raise _of_all(problems)

    async def _generate(self, route: Route, target: Target, job: Job) -> AsyncGenerator[Event, None]:
        """A generation at one head."""
        with self._pipelines.running(route), contextlib.ExitStack() as stack, _head_errors(route):
            call = self._stub(route).Generate(_request(route, target, job))
            stack.callback(call.cancel)
            started = await _first(call)
            yield Started(started.request_id, started.prompt_tokens, route.name)
            progress = _Progress(target, job, self._metrics.of_pipeline(route.name))
            async with contextlib.aclosing(progress.events(call)) as events:
                async for event in events:
                    yield event

    async def embed(self, target: Target, tokens: Sequence[int]) -> Sequence[float]:
        """The embedding of a prompt, of length 1. Raises as `generate` does, and NotSupported."""
        problems: list[EldricError] = []
        for route in self._pipelines.by_load(_fitting(target, len(tokens))):
            request = inference_pb2.EmbedRequest(model=route.name, tokens=inference_pb2.TokenIds(ids=tokens))
            try:
                with self._pipelines.running(route), _head_errors(route):
                    return (await self._stub(route).Embed(request, timeout=EMBED_TIMEOUT_S)).embedding
            except EldricError as error:
                if not _may_retry(error):
                    raise
                problems.append(error)
        raise _of_all(problems)

    async def cancel(self, request_id: str) -> bool:
        """Ends a generation wherever it runs: it may have come by another router."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        calls = [self._stub(route).Cancel(request, timeout=5.0) for route in self._pipelines.ready_routes()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return any(isinstance(each, inference_pb2.CancelResponse) and each.cancelled for each in answers)

    def _stub(self, route: Route) -> "inference_pb2_grpc.InferenceAsyncStub":
        return inference_pb2_grpc.InferenceStub(self._channels.to(route.head_address, "worker", route.head_name))


class _Progress:
    """What came of a generation so far."""

    __slots__ = ("_began", "_count", "_first", "_job", "_last", "_metrics", "_settled", "_text", "_want_tokens")

    def __init__(self, target: Target, job: Job, metrics: ModelMetrics) -> None:
        self._job = job
        self._metrics = metrics
        self._text = TextStream(target.vocabulary.tokenizer, job.stop)
        self._began = job.arrived or time.perf_counter()
        self._first = self._last = 0.0
        self._count = self._settled = 0
        metrics.prompt_tokens.inc(len(job.prompt))

    async def events(self, call: Any) -> AsyncGenerator[Delta | Finished, None]:
        reason = "gone"
        try:
            while (message := await read(call)) is not grpc.aio.EOF:
                if message.HasField("delta"):
                    yield self._delta(message.delta.tokens)
                    if self._text.stopped is not None:
                        reason = "stop"
                        yield self._stopped()
                        return
                elif message.HasField("finished"):
                    if text := self._text.flush():
                        self._settled = self._count
                        yield Delta(text, (), self._settled)
                    finished = self._finished(message.finished)
                    reason = finished.reason
                    yield finished
                    return
            raise Unavailable("the head ended a generation without a word")
        except Exception:
            reason = "failed"
            raise
        finally:
            self._metrics.ended(reason)

    def _delta(self, sampled: Sequence[inference_pb2.GeneratedToken]) -> Delta:
        self._measure(len(sampled))
        text, tokens = "", []
        for each in sampled:
            self._count += 1
            tokens.append(_token(each))
            with contextlib.suppress(InvalidPrompt):  # an id by which a model fills up its output has no text
                piece = self._text.push(each.id)
                if piece:
                    text += piece
                    self._settled = self._count
            if self._text.stopped is not None:
                break
        return Delta(text, tuple(tokens), self._settled)

    def _measure(self, count: int) -> None:
        now = time.perf_counter()
        self._metrics.generated_tokens.inc(count)
        if self._count:
            self._metrics.inter_token.observe((now - self._last) / max(1, count))
        else:
            self._first = now
            self._metrics.first_token.observe(now - self._began)
        self._last = now

    def _finished(self, finished: inference_pb2.Finished) -> Finished:
        timings = finished.timings
        return Finished(
            reason="stop" if self._text.stopped is not None else REASONS.get(finished.reason, "stop"),
            stop=self._text.stopped or "",
            prompt_tokens=len(self._job.prompt),
            completion_tokens=self._count,
            queue_ms=timings.queue_ms,
            prompt_ms=timings.prompt_ms,
            generation_ms=timings.generation_ms,
            cached_tokens=finished.usage.cached_tokens,
        )

    def _stopped(self) -> Finished:
        """A stop string ended it: the head is not waited for, so these times are this router's."""
        return Finished(
            reason="stop",
            stop=self._text.stopped or "",
            prompt_tokens=len(self._job.prompt),
            completion_tokens=self._count,
            queue_ms=0.0,
            prompt_ms=(self._first - self._began) * 1e3,
            generation_ms=(self._last - self._first) * 1e3,
        )


def _of_all(problems: Sequence[EldricError]) -> EldricError:
    """What is said when no replica took a request: that one is full, since that passes, else the first problem."""
    return next((each for each in problems if each.status == "RESOURCE_EXHAUSTED"), problems[0])


def _fitting(target: Target, tokens: int) -> list[Route]:
    """The routes whose context holds the prompt and at least one token more."""
    routes = [route for route in target.routes if not 0 < route.context <= tokens]
    if not routes:
        raise PromptTooLong(tokens, target.context)
    return routes


def _request(route: Route, target: Target, job: Job) -> inference_pb2.GenerateRequest:
    ends = () if job.ignore_eos else target.vocabulary.stop_tokens
    return inference_pb2.GenerateRequest(
        model=route.name,
        tokens=inference_pb2.TokenIds(ids=job.prompt),
        sampling=job.sampling,
        max_tokens=job.max_tokens,
        stop_tokens=sorted({*ends, *job.stop_tokens}),
        ignore_eos=job.ignore_eos,
        ignore_cache=job.ignore_cache,
        request_id=job.request_id,
    )


async def read(call: Any) -> Any:
    """The next message of a call; who waits for it and is cancelled cancels the call.

    grpc.aio (1.85) never frees the memory of a read that is itself cancelled, about 1 KiB: it is left to end with the
    call.
    """
    reading = asyncio.ensure_future(call.read())
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        call.cancel()
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()  # nobody else looks at it
        raise


async def _first(call: Any) -> inference_pb2.Started:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            message = await read(call)
    except TimeoutError:
        raise Unavailable("the head did not answer in time") from None
    if message is grpc.aio.EOF or not message.HasField("started"):
        raise Unavailable("the head ended a generation before it began")
    started: inference_pb2.Started = message.started
    return started


@contextlib.contextmanager
def _head_errors(route: Route) -> Any:
    """What a head's failure means to a client. Raises InvalidRequest, QueueIsFull, NotSupported, PipelineLost."""
    try:
        with call_errors(f"head worker {route.head_name or route.head_address}"):
            yield
    except NotSupported:
        raise
    except (Unavailable, NotFound, NotReady) as error:
        raise PipelineLost(f"the pipeline {route.name!r} cannot go on: {error.message}") from error


def _may_retry(error: EldricError) -> bool:
    return error.status in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")


def _token(sampled: inference_pb2.GeneratedToken) -> Token:
    if not sampled.HasField("logprob"):
        return Token(sampled.id, None, ())
    return Token(sampled.id, sampled.logprob, tuple((top.token, top.logprob) for top in sampled.top))


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """The seed of one of several generations of a request: the request's own for the first, well apart for the others
    (splitmix64, Steele et al. 2014). None, a random one, stays None."""
    if seed is None or index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, empty ones left out. Raises InvalidRequest for too many or too long ones."""
    kept = tuple(dict.fromkeys(each for each in stop if each))
    if len(kept) > 16 or any(len(each.encode()) > 1024 for each in kept):
        raise InvalidRequest("at most 16 stop strings, each of at most 1 KiB")
    return kept
