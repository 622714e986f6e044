"""The Inference service for text, over gRPC: what the Python client and the command line use."""

import contextlib
import time
from collections.abc import AsyncGenerator

from eldric.errors import InvalidRequest
from eldric.router.admission import Admission
from eldric.router.generation import Delta, Event, Finished, Heads, Job, Started, Token, check_stop
from eldric.router.prompts import Conversation, Prompts, Target
from eldric.router.vocabularies import Vocabulary
from eldric.v1 import inference_pb2, inference_pb2_grpc

_REASONS = {
    "stop": inference_pb2.STOP,
    "length": inference_pb2.LENGTH,
    "cancelled": inference_pb2.CANCELLED,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Text, conversations or token ids in; text and tokens out."""

    def __init__(self, prompts: Prompts, heads: Heads, admission: Admission) -> None:
        self._prompts = prompts
        self._heads = heads
        self._admission = admission

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncGenerator[inference_pb2.GenerateEvent, None]:
        arrived = time.perf_counter()
        with self._admission.admit():
            stop = check_stop(request.stop)
            target = await self._prompts.find(request.model)
            job = Job(
                prompt=await _prompt(target, request),
                sampling=request.sampling,
                max_tokens=request.max_tokens,
                stop=stop,
                stop_tokens=tuple(request.stop_tokens),
                ignore_eos=request.ignore_eos,
                ignore_cache=request.ignore_cache,
                request_id=request.request_id,
                arrived=arrived,
            )
            async with contextlib.aclosing(self._heads.generate(target, job)) as events:
                async for event in events:
                    yield _message(event, target.vocabulary)

    async def Embed(self, request: inference_pb2.EmbedRequest, context: object) -> inference_pb2.EmbedResponse:
        with self._admission.admit():
            target = await self._prompts.find(request.model)
            match request.WhichOneof("input"):
                case "text":
                    tokens = await target.encode(request.text)
                case "tokens":
                    tokens = target.checked(list(request.tokens.ids))
                case _:
                    raise InvalidRequest("the request has no input: set text or tokens")
            embedding = await self._heads.embed(target, tokens)
            return inference_pb2.EmbedResponse(embedding=embedding, prompt_tokens=len(tokens))

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: object) -> inference_pb2.TokenizeResponse:
        target = await self._prompts.find(request.model)
        add_bos = request.add_bos if request.HasField("add_bos") else None
        ids = await target.tokenize(request.text, special=request.special, add_bos=add_bos)
        return inference_pb2.TokenizeResponse(ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: object
    ) -> inference_pb2.DetokenizeResponse:
        target = await self._prompts.find(request.model)
        return inference_pb2.DetokenizeResponse(text=await target.detokenize(request.ids))

    async def Cancel(self, request: inference_pb2.CancelRequest, context: object) -> inference_pb2.CancelResponse:
        return inference_pb2.CancelResponse(cancelled=await self._heads.cancel(request.request_id))


async def _prompt(target: Target, request: inference_pb2.GenerateRequest) -> list[int]:
    match request.WhichOneof("input"):
        case "prompt":
            return await target.encode(request.prompt)
        case "chat":
            messages = request.chat.messages
            if not messages:
                raise InvalidRequest("the conversation has no messages")
            continues = messages[-1].role == "assistant" and messages[-1].content != ""
            plain = [{"role": each.role, "content": each.content} for each in messages]
            return await target.render(Conversation(plain, continues))
        case "tokens":
            return target.checked(list(request.tokens.ids))
    raise InvalidRequest("the request has no input: set prompt, chat or tokens")


def _message(event: Event, vocabulary: Vocabulary) -> inference_pb2.GenerateEvent:
    match event:
        case Delta(text, tokens):
            delta = inference_pb2.Delta(text=text, tokens=[_token(token, vocabulary) for token in tokens])
            return inference_pb2.GenerateEvent(delta=delta)
        case Started():
            started = inference_pb2.Started(request_id=event.request_id, prompt_tokens=event.prompt_tokens)
            return inference_pb2.GenerateEvent(started=started)
        case Finished():
            return inference_pb2.GenerateEvent(finished=_finished(event))


def _token(token: Token, vocabulary: Vocabulary) -> inference_pb2.GeneratedToken:
    made = inference_pb2.GeneratedToken(id=token.id, logprob=token.logprob, text=vocabulary.token_bytes(token.id))
    for id, logprob in token.top:
        made.top.add(token=id, logprob=logprob, text=vocabulary.token_bytes(id, special=True))
    return made


def _finished(event: Finished) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        reason=_REASONS[event.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_tokens=event.cached_tokens,
        ),
        timings=inference_pb2.Timings(
            queue_ms=event.queue_ms, prompt_ms=event.prompt_ms, generation_ms=event.generation_ms
        ),
        stop=event.stop,
    )
