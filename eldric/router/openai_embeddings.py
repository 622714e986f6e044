"""/v1/embeddings: texts as vectors. Fields: platform.openai.com/docs/api-reference/embeddings."""

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from eldric.engine.errors import InvalidPrompt
from eldric.errors import InvalidRequest
from eldric.event_stream import disconnected, unless_gone
from eldric.router import openai_unserved
from eldric.router.errors import InvalidParameter, PromptTooLong
from eldric.router.generation import Heads
from eldric.router.openai_text import StrictBody, Text
from eldric.router.openai_types import as_prompts
from eldric.router.openai_unserved import refuse_unserved
from eldric.router.prompts import Prompts, Target

#: Texts of one request, as at OpenAI's; and how many of them are at work at once.
MAX_INPUTS = 2048
AT_ONCE = 4


class EmbeddingsBody(StrictBody):
    model: Text | None = None
    input: Annotated[list[str | list[int]], PlainValidator(lambda value: as_prompts(value, MAX_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = None


def embeddings_body(body: Mapping[str, Any]) -> EmbeddingsBody:
    """Raises InvalidParameter, pydantic.ValidationError."""
    refuse_unserved(body, openai_unserved.EMBEDDING)
    return EmbeddingsBody.model_validate(body)


class Embeddings:
    """Answers requests for embeddings. The event loop is given up between two texts: thousands of them, and the
    millions of numbers of their vectors, hold up nobody else."""

    def __init__(self, prompts: Prompts, heads: Heads) -> None:
        self._prompts, self._heads = prompts, heads

    async def answer(self, request: Request, model: str, body: EmbeddingsBody) -> Response:
        """Raises ClientGone when the client goes away, what Prompts.find, Target.encode and Heads.embed raise, and
        InvalidParameter."""
        answer = await unless_gone(self._answer(model, body), disconnected(request))
        return Response(answer, media_type="application/json")

    async def _answer(self, model: str, body: EmbeddingsBody) -> bytes:
        target = await self._prompts.find(model)
        prompts = []
        for each in body.input:
            prompts.append(await _tokens(target, each, body.add_special_tokens))
            await asyncio.sleep(0)  # a short text is encoded without a wait
        entries = await self._entries(target, prompts, body)
        tokens = sum(map(len, prompts))
        rest = _json({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
        return b'{"object":"list","data":[' + b",".join(entries) + b"]," + rest[1:]

    async def _entries(self, target: Target, prompts: Sequence[Sequence[int]], body: EmbeddingsBody) -> list[bytes]:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, tokens: Sequence[int]) -> bytes:
            async with room:
                return _entry(index, await self._heads.embed(target, tokens), body)

        tasks = [asyncio.ensure_future(one(*each)) for each in enumerate(prompts)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _tokens(target: Target, given: str | list[int], add_special: bool | None) -> list[int]:
    """Raises PromptTooLong and InvalidParameter, which name the field."""
    add_bos = False if add_special is False else None
    try:
        return await target.encode(given, add_bos=add_bos) if isinstance(given, str) else target.checked(given)
    except PromptTooLong as error:
        error.param = "input"
        raise
    except (InvalidPrompt, InvalidRequest) as error:
        raise InvalidParameter(str(error), "input") from error


def _entry(index: int, vector: Sequence[float], body: EmbeddingsBody) -> bytes:
    """base64: of little-endian f32, which is what OpenAI's own client asks for."""
    if body.dimensions not in (None, len(vector)):
        raise InvalidParameter(
            f"This model's embeddings have {len(vector)} dimensions and cannot be shortened.", "dimensions"
        )
    numbers = np.array(vector, "<f4")
    packed = body.encoding_format == "base64"
    embedding = base64.b64encode(numbers.tobytes()).decode() if packed else numbers.tolist()
    return _json({"object": "embedding", "index": index, "embedding": embedding})


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
