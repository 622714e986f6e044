"""/v1/embeddings: texts as vectors. Fields: platform.openai.com/docs/api-reference/embeddings."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eldric.event_stream import disconnected, unless_gone
from eldric.router.errors import InvalidParameter
from eldric.router.generation import Heads
from eldric.router.openai_types import StrictBody, Text, as_prompts
from eldric.router.prompts import Prompts, Target

#: Texts of one request, as at OpenAI's; and how many of them are at work at once.
MAX_INPUTS = 2048
AT_ONCE = 4


class EmbeddingsBody(StrictBody):
    model: Text | None = None
    input: Annotated[list[str | list[int]], PlainValidator(lambda value: as_prompts(value, MAX_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class Embeddings:
    """Answers requests for embeddings."""

    def __init__(self, prompts: Prompts, heads: Heads) -> None:
        self._prompts, self._heads = prompts, heads

    async def answer(self, request: Request, model: str, body: EmbeddingsBody) -> Response:
        """Raises ClientGone when the client goes away, what Prompts.find, Target.encode and Heads.embed raise, and
        InvalidParameter."""
        target = await self._prompts.find(model)
        prompts = [await _tokens(target, each) for each in body.input]
        vectors = await unless_gone(self._all(target, prompts), disconnected(request))
        if body.dimensions not in (None, len(vectors[0])):
            raise InvalidParameter(
                f"This model's embeddings have {len(vectors[0])} dimensions and cannot be shortened.", "dimensions"
            )
        tokens = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    async def _all(self, target: Target, prompts: Sequence[Sequence[int]]) -> list[Sequence[float]]:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(tokens: Sequence[int]) -> Sequence[float]:
            async with room:
                return await self._heads.embed(target, tokens)

        tasks = [asyncio.ensure_future(one(tokens)) for tokens in prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _tokens(target: Target, given: str | list[int]) -> list[int]:
    return await target.encode(given) if isinstance(given, str) else target.checked(given)


def _encoded(vector: Sequence[float], encoding: str | None) -> Any:
    """base64: of little-endian f32, which is what OpenAI's own client asks for."""
    numbers = np.array(vector, "<f4")
    return base64.b64encode(numbers.tobytes()).decode() if encoding == "base64" else numbers.tolist()
