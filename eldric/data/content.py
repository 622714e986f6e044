"""GET /api/v1/models/{id}/content: a model's file over HTTP, whole or in ranges."""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from eldric.data.byte_ranges import satisfiable
from eldric.data.content_file import ContentFile
from eldric.data.model import StoredModel
from eldric.data.transfers import Transfers
from eldric.errors import InvalidRequest, NotFound
from eldric.security.access import authorise
from eldric.security.expelled import Expelled
from eldric.web import http_caller

#: The call whose callers may have a model's bytes.
_METHOD = "/eldric.v1.ModelStore/Pull"
#: Longest that a caller may take to read a piece, in seconds; then its connection is closed.
STALL_S = 30.0


def content_route(
    find: Callable[[str], Awaitable[StoredModel]], served_bytes: Counter, transfers: Transfers, expelled: Expelled
) -> Route:
    """The route; find: gives a model by name or raises NotFound. expelled: who may have nothing any more.

    `?file=N` picks a file of a split set, counted from 0. Range (several too) answers 206 or 416, If-Range and
    If-None-Match hold ETag, which is the file's SHA-256 where it is known. Too many at once are answered 503, with
    Retry-After.
    """

    async def content(request: Request) -> Response:
        caller = http_caller(request)
        authorise(_METHOD, caller)
        expelled.check(caller)
        number = _file_number(request)
        model = await find(request.path_params["id"])
        path = model.path(number)
        _ = model.sound_header  # a damaged model is not given away
        try:
            status = await asyncio.to_thread(os.stat, path)
        except FileNotFoundError:
            raise NotFound(f"the model store has no model {model.id!r} any more") from None
        headers = _digests(model.files[number].sha256)
        turn = transfers.turn(caller.node_id if caller is not None else "")
        response = _Content(path, headers, status, served_bytes, turn)
        if _is_known(request, response.headers["etag"]):
            return Response(status_code=304, headers={"etag": response.headers["etag"]})
        return response

    return Route("/api/v1/models/{id}/content", content, methods=["GET"])


class _Content(FileResponse):
    """A file in larger pieces than usual, counted, sent when its turn has come."""

    chunk_size = 256 << 10

    def __init__(
        self,
        path: os.PathLike[str],
        headers: dict[str, str],
        status: os.stat_result,
        served_bytes: Counter,
        turn: AbstractAsyncContextManager[None],
    ) -> None:
        name = os.path.basename(path)
        super().__init__(
            path, headers=headers, media_type="application/octet-stream", filename=name, stat_result=status
        )
        self._size_bytes = status.st_size
        self._served_bytes = served_bytes
        self._turn = turn

    @contextlib.asynccontextmanager
    async def _open_file(self) -> "AsyncIterator[Any]":
        """In place of Starlette's file, whose every call goes through a thread. Where a version of Starlette does not
        ask for it, the answer is the same, for more of the processor's time."""
        file = await asyncio.to_thread(ContentFile, self.path)
        try:
            yield file
        finally:
            file.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            self._served_bytes.inc(len(message.get("body", b"")))
            async with asyncio.timeout(STALL_S):  # nobody may keep a turn without reading
                await send(message)

        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        if "range" in headers:
            field = satisfiable(headers["range"], self._size_bytes)
            if field is None:
                del headers["range"]
            else:
                headers["range"] = field
        if scope["method"] == "HEAD":
            await super().__call__(scope, receive, counted)
            return
        async with self._turn:
            await super().__call__(scope, receive, counted)


def _file_number(request: Request) -> int:
    unknown = set(request.query_params) - {"file"}
    text = request.query_params.get("file", "0")
    if unknown or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest("the only query parameter is file=N, the number of a file of a split set, from 0")
    return int(text)


def _digests(sha256: str) -> dict[str, str]:
    """ETag, and Repr-Digest (RFC 9530), of a file whose sum is known."""
    if not sha256:
        return {}
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"etag": f'"{sha256}"', "repr-digest": f"sha-256=:{digest}:"}


def _is_known(request: Request, etag: str) -> bool:
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return etag in known or "*" in known
