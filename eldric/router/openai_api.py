"""The HTTP face for OpenAI's clients: /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings; and
llama.cpp's /tokenize and /detokenize."""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from eldric.event_stream import ClientGone
from eldric.router.admission import Admission
from eldric.router.errors import MAX_QUOTED, InvalidParameter, ModelNotFound
from eldric.router.http_body import BodyReader
from eldric.router.metrics import RouterMetrics
from eldric.router.openai_embeddings import Embeddings, embeddings_body
from eldric.router.openai_errors import ApiError, api_error
from eldric.router.openai_generation import Body, Completions
from eldric.router.openai_types import DetokenizeBody, TokenizeBody, chat_body, completion_body
from eldric.router.pipelines import Pipelines, state_name
from eldric.router.prompts import Prompts
from eldric.router.sse import ChunkStream

log = logging.getLogger(__name__)

Handler = Callable[[Request, AsyncExitStack], Awaitable[Response]]

#: What nginx writes for a client that closed its connection before the answer.
CLIENT_GONE = 499


class OpenAiApi:
    """The routes. Every error, of a path that is unknown too, has OpenAI's shape.

    A request is counted once its body is here, so that those whose body does not come keep nobody out.
    """

    def __init__(
        self,
        pipelines: Pipelines,
        prompts: Prompts,
        completions: Completions,
        embeddings: Embeddings,
        admission: Admission,
        metrics: RouterMetrics,
        bodies: BodyReader,
    ) -> None:
        self._bodies = bodies
        self._pipelines = pipelines
        self._prompts = prompts
        self._completions = completions
        self._embeddings = embeddings
        self._admission = admission
        self._metrics = metrics

    def routes(self) -> list[BaseRoute]:
        return [
            self._route("/v1/models", "GET", self._models),
            self._route("/v1/models/{name:path}", "GET", self._model),
            self._route("/v1/chat/completions", "POST", self._chat),
            self._route("/v1/completions", "POST", self._complete),
            self._route("/v1/embeddings", "POST", self._embed),
            self._route("/tokenize", "POST", self._tokenize),
            self._route("/detokenize", "POST", self._detokenize),
            *(Route(path, _Unknown()) for path in ("/v1", "/v1/{path:path}", *_WITHOUT_V1)),
        ]

    def _route(self, path: str, method: str, handler: Handler) -> Route:
        endpoint = path.removesuffix("/{name:path}")

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            async with AsyncExitStack() as stack:
                response = await self._handle(request, stack, handler)
                ended = response.cleanup if isinstance(response, ChunkStream) else stack
                ended.callback(self._count, endpoint, response.status_code, began)
            return response

        return Route(path, _OneMethod(method, answer))

    async def _handle(self, request: Request, stack: AsyncExitStack, handler: Handler) -> Response:
        try:
            return await handler(request, stack)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return api_error(error, request.url.path).response()

    def _count(self, endpoint: str, code: int, began: float) -> None:
        seconds = time.perf_counter() - began
        self._metrics.requests.labels(endpoint, str(code)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        log.info("event=request endpoint=%s code=%d ms=%.1f", endpoint, code, seconds * 1e3)

    async def _chat(self, request: Request, stack: AsyncExitStack) -> Response:
        return await self._generate(request, stack, chat_body)

    async def _complete(self, request: Request, stack: AsyncExitStack) -> Response:
        return await self._generate(request, stack, completion_body)

    async def _embed(self, request: Request, stack: AsyncExitStack) -> Response:
        body = await self._bodies.read(request, embeddings_body)
        stack.enter_context(self._admission.admit())
        return await self._embeddings.answer(request, self._name(body.model), body)

    async def _generate(
        self, request: Request, stack: AsyncExitStack, check: Callable[[dict[str, Any]], Body]
    ) -> Response:
        arrived = time.perf_counter()
        body = await self._bodies.read(request, check)
        stack.enter_context(self._admission.admit())
        return await self._completions.answer(request, self._name(body.model), body, arrived, stack)

    def _name(self, asked: str | None) -> str:
        """The model that a request means: with a single one deployed, it may be left out."""
        name = asked or self._pipelines.only_name()
        if name is None:
            known = ", ".join(self._pipelines.names()) or "none"
            raise InvalidParameter(
                f"Missing required parameter: 'model'. Deployed are: {known}.", "model", "missing_required_parameter"
            )
        return name

    async def _models(self, request: Request, stack: AsyncExitStack) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self._pipelines.names()]})

    async def _model(self, request: Request, stack: AsyncExitStack) -> Response:
        name = request.path_params["name"]
        if not name:
            return _unknown(request)
        if name not in self._pipelines.names():
            raise ModelNotFound(name, self._pipelines.names())
        return JSONResponse(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it, with its state, the best of its pipelines', and its context in tokens."""
        infos = self._pipelines.infos(name)
        best = min(infos, key=lambda info: _STATES.get(state_name(info), len(_STATES)))
        return {
            "id": name,
            "object": "model",
            "created": min(info.created_at.seconds for info in infos),
            "owned_by": "eldric",
            "state": state_name(best),
            "context_length": best.options.context,
        }

    async def _tokenize(self, request: Request, stack: AsyncExitStack) -> Response:
        body = await self._bodies.read(request, TokenizeBody.model_validate)
        stack.enter_context(self._admission.admit())
        target = await self._prompts.find(self._name(body.model))
        add_bos = None if body.add_special else False
        tokens: list[Any] = list(await target.tokenize(body.content, special=body.parse_special, add_bos=add_bos))
        if body.with_pieces:
            piece = target.vocabulary.tokenizer.piece
            tokens = [{"id": token, "piece": piece(token)} for token in tokens]
        return JSONResponse({"tokens": tokens})

    async def _detokenize(self, request: Request, stack: AsyncExitStack) -> Response:
        body = await self._bodies.read(request, DetokenizeBody.model_validate)
        stack.enter_context(self._admission.admit())
        target = await self._prompts.find(self._name(body.model))
        return JSONResponse({"content": await target.detokenize(body.tokens)})


class _OneMethod:
    """Says in OpenAI's shape that there is no other method. An instance: Starlette would say it in a way of its own."""

    def __init__(self, method: str, answer: Callable[[Request], Awaitable[Response]]) -> None:
        self._methods = (method, "HEAD") if method == "GET" else (method,)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        if request.method in self._methods:
            response = await self._answer(request)
        else:
            message = f"Invalid method for URL ({request.method} {request.url.path}): it takes {self._methods[0]}."
            response = ApiError(405, message, "invalid_request_error", None, "method_not_supported").response()
            response.headers["allow"] = ", ".join(self._methods)
        await response(scope, receive, send)


class _Unknown:
    """What is not served, whatever the method."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unknown(Request(scope, receive, send))(scope, receive, send)


def _unknown(request: Request) -> Response:
    path = request.url.path
    hint = "GET /docs lists what there is."
    if path in _WITHOUT_V1:
        hint = f"There is /v1{path}: give your client a base URL that ends with /v1."
    message = f"Unknown request: {request.method} {path[:MAX_QUOTED]}. {hint}"
    return ApiError(404, message, "invalid_request_error", None, "unknown_url").response()


#: What clients call that were told a base URL without /v1.
_WITHOUT_V1 = ("/models", "/chat/completions", "/completions", "/embeddings")
_STATES = {"ready": 0, "deploying": 1, "degraded": 2, "undeploying": 3}
