"""/v1/chat/completions and /v1/completions: from a body to an answer, whole or streamed."""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from eldric import __version__
from eldric.engine.errors import InvalidPrompt
from eldric.errors import InvalidRequest
from eldric.event_stream import disconnected, unless_gone
from eldric.router.admission import Admission
from eldric.router.errors import InvalidParameter, PromptTooLong
from eldric.router.feed import Feed
from eldric.router.generation import Delta, Finished, Heads, Job, seed_of_choice
from eldric.router.openai_chunks import DONE, ChatFormat, Choice, CompletionFormat, settled_at_end
from eldric.router.openai_errors import api_error
from eldric.router.openai_logprobs import ChatLogprobs, CompletionLogprobs
from eldric.router.openai_types import MAX_CHOICES, ChatBody, CompletionBody
from eldric.router.prompts import Prompts, Target
from eldric.router.sse import ChunkStream
from eldric.v1 import sampling_pb2

log = logging.getLogger(__name__)

Body = ChatBody | CompletionBody
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Request:
    """A body whose model was found and whose prompts were tokenized."""

    target: Target
    body: Body
    jobs: Sequence[Job]
    choices: Sequence[Choice]
    format: ChatFormat


class Completions:
    """Answers both endpoints."""

    def __init__(self, prompts: Prompts, heads: Heads, admission: Admission) -> None:
        self._prompts = prompts
        self._heads = heads
        self._admission = admission

    async def answer(self, request: Request, model: str, body: Body, arrived: float, stack: AsyncExitStack) -> Response:
        """`stack` holds what the request takes, one place of the admission among it; a stream takes it over.

        Raises ClientGone when the client goes away; whatever else it raises is the request's error.
        """
        work = self._begin(model, body, arrived, stack)
        made, feed, pipeline = await unless_gone(work, disconnected(request))
        headers = {"x-request-id": made.format.id, "x-eldric-pipeline": pipeline}
        if body.stream:
            chunks = _chunks(made, feed, request.url.path)
            return ChunkStream(chunks, lambda: disconnected(request), stack.pop_all(), headers)
        answer = await unless_gone(_whole(made, feed), disconnected(request))
        return Response(answer, media_type="application/json", headers=headers)

    async def _begin(self, model: str, body: Body, arrived: float, stack: AsyncExitStack) -> tuple[_Request, Feed, str]:
        """Returns when heads have taken every generation."""
        made = await self._prepare(await self._prompts.find(model), body, arrived)
        if len(made.jobs) > 1:
            stack.enter_context(self._admission.admit(len(made.jobs) - 1))
        feed = Feed([self._heads.generate(made.target, job) for job in made.jobs])
        started = await (await stack.enter_async_context(feed)).start()
        return made, feed, started[0].pipeline if started else made.target.routes[0].name

    async def _prepare(self, target: Target, body: Body, arrived: float) -> _Request:
        logprobs = body.logprob_count
        sampling = body.sampling(logprobs)
        size = target.vocabulary.tokenizer.vocab_size
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", body.stop_token_ids or ())):
            if any(token >= size for token in tokens):
                raise InvalidParameter(f"A token id is not in the vocabulary, [0, {size}).", name)
        job = Job(
            prompt=(),
            sampling=sampling,
            max_tokens=body.limit,
            stop=tuple(body.stop or ()),
            stop_tokens=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            ignore_cache=body.cache_prompt is False,
            arrived=arrived,
        )
        prompts = await _prompt_tokens(target, body)
        if len(prompts) * body.choices > MAX_CHOICES:
            raise InvalidParameter(f"Expected at most {MAX_CHOICES} choices, counting each prompt's.", "n")
        format = _format(target, body)
        choices, jobs = [], []
        for index in range(len(prompts) * body.choices):
            prompt, number = divmod(index, body.choices)
            choices.append(Choice(index, prompt, _logprobs(target, body, logprobs)))
            jobs.append(_numbered(job, prompts[prompt], seed_of_choice(body.seed_bits, number), f"{format.id}-{index}"))
        if body.limited_by[1] == 0:  # only what `echo` gives
            for choice, job in zip(choices, jobs, strict=True):
                choice.finished = Finished("length", "", len(job.prompt), 0, 0.0, 0.0, 0.0)
            jobs.clear()
        return _Request(target, body, jobs, choices, format)


def _numbered(job: Job, prompt: Sequence[int], seed: int | None, request_id: str) -> Job:
    """One of a request's generations."""
    sampling = sampling_pb2.SamplingParams()
    sampling.CopyFrom(job.sampling)
    if seed is not None:
        sampling.seed = seed
    return replace(job, prompt=prompt, sampling=sampling, request_id=request_id)


async def _prompt_tokens(target: Target, body: Body) -> list[list[int]]:
    """Token ids of each prompt. Raises PromptTooLong and InvalidParameter, which name the field."""
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    try:
        if isinstance(body, ChatBody):
            return [await target.render(body.conversation)]
        add_bos = False if body.add_special_tokens is False else None
        return [
            await target.encode(each, add_bos=add_bos) if isinstance(each, str) else target.checked(each)
            for each in body.prompt
        ]
    except PromptTooLong as error:
        error.param = param
        raise
    except InvalidParameter:
        raise
    except (InvalidPrompt, InvalidRequest) as error:
        raise InvalidParameter(str(error), param) from error


def _format(target: Target, body: Body) -> ChatFormat:
    kind = ChatFormat if isinstance(body, ChatBody) else CompletionFormat
    envelope = {
        "id": kind.id_prefix + secrets.token_hex(12),
        "created": int(time.time()),
        "model": target.name,
        "system_fingerprint": _fingerprint(target),
    }
    if isinstance(body, ChatBody):
        return ChatFormat(envelope, body.include_usage)
    decode = target.vocabulary.tokenizer.decode
    echo = [each if isinstance(each, str) else decode(each, special=True) for each in body.prompt] if body.echo else []
    return CompletionFormat(envelope, body.include_usage, echo)


def _fingerprint(target: Target) -> str:
    """Changes when the model file, the deployment's options or this program do."""
    route = target.routes[0]
    digest = hashlib.sha256(route.source.header_sha256 + route.options + __version__.encode())
    return f"fp_{digest.hexdigest()[:10]}"


def _logprobs(target: Target, body: Body, count: int | None) -> ChatLogprobs | CompletionLogprobs | None:
    if count is None:
        return None
    return (ChatLogprobs if isinstance(body, ChatBody) else CompletionLogprobs)(target.vocabulary)


async def _chunks(made: _Request, feed: Feed, path: str) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error becomes an event, after which there is no [DONE]."""
    format, choices = made.format, made.choices
    try:
        if begin := b"".join(map(format.first, choices)):
            yield begin
        for choice in choices:
            if choice.finished is not None:
                yield format.finish(choice, choice.finished)
        while any(choice.finished is None for choice in choices):
            chunks = []
            for index, event in await feed.take():
                if isinstance(event, Delta):
                    chunks.append(format.delta(choices[index], event))
                elif isinstance(event, Finished):
                    choices[index].finished = event
                    chunks.append(format.finish(choices[index], event))
            if joined := b"".join(chunks):
                yield joined
        if made.body.include_usage:
            yield format.usage(choices)
        yield DONE
    except Exception as error:
        log.warning("event=stream_failed id=%s error=%r", format.id, str(error))
        yield f"data: {json.dumps(api_error(error, path).as_json())}\n\n".encode()


async def _whole(made: _Request, feed: Feed) -> bytes:
    while any(choice.finished is None for choice in made.choices):
        for index, event in await feed.take():
            choice = made.choices[index]
            if isinstance(event, Delta):
                choice.text.append(event.text)
                if choice.logprobs is not None:
                    choice.logprobs.keep(event.tokens, event.settled)
            elif isinstance(event, Finished):
                choice.finished = event
                if choice.logprobs is not None:
                    choice.logprobs.keep((), settled_at_end(event))
    return made.format.answer(made.choices)
