"""Server-sent events (WHATWG HTML, section 9.2) out of an asynchronous generator, until the client goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eldric.http_errors import json_failure
from eldric.interceptors import CallFailed, Failure

#: A stream in which nothing happens sends a comment this often, so that nobody in between drops it.
KEEP_ALIVE_S = 15.0

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; what it had asked for is cancelled."""


async def unless_gone(work: Coroutine[Any, Any, T], gone: Awaitable[None]) -> T:
    """The result of `work`, in a task of its own. Cancels it when `gone` returns first, and raises ClientGone."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait({task, watch})


async def disconnected(request: Request) -> None:
    """Returns when the client went away; for use after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """One JSON message per event; a failure is the last one, `event: error`.

    A task of its own runs the generator, one message ahead at most, and is cancelled when the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncGenerator[Any, None], gone: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._gone = gone
        self._queue: asyncio.Queue[bytes | Failure | None] = asyncio.Queue(1)
        self._task = asyncio.create_task(self._run(messages))
        self._first: bytes | Failure | None = b""

    @classmethod
    async def begin(cls, messages: AsyncGenerator[Any, None], gone: Callable[[], Awaitable[None]]) -> Self:
        """A stream whose first message is there, or is slow to come. Raises CallFailed when it fails before, and
        ClientGone."""
        stream = cls(messages, gone)
        try:
            stream._first = await unless_gone(stream._next(), gone())
            if isinstance(stream._first, Failure):
                raise CallFailed(stream._first)
        except BaseException:
            stream._task.cancel()
            raise
        return stream

    async def _run(self, messages: AsyncGenerator[Any, None]) -> None:
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    await self._queue.put(f"data: {json.dumps(message)}\n\n".encode())
        except CallFailed as error:
            await self._queue.put(error.failure)
        else:
            await self._queue.put(None)

    async def _next(self) -> bytes | Failure | None:
        """The next event, a comment when there is none for long, or None at the end."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):  # wait_for of Python 3.11 may lose a cancellation
                return await self._queue.get()
        except TimeoutError:
            return b": still there\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(self._send_all(send), self._gone())
        except ClientGone:
            pass
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _send_all(self, send: Send) -> None:
        event = self._first
        while isinstance(event, bytes):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            event = await self._next()
        last = b""
        if isinstance(event, Failure):
            last = f"event: error\ndata: {json.dumps(json_failure(event))}\n\n".encode()
        await send({"type": "http.response.body", "body": last, "more_body": False})
