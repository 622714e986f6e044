"""Server-sent events (WHATWG HTML, section 9.2) of chunks that are made already."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eldric.event_stream import ClientGone, unless_gone

#: A stream in which nothing happens sends a comment this often, so that nobody in between drops it; in seconds.
KEEP_ALIVE_S = 15.0
#: A client that takes nothing for this long is given up, in seconds.
SEND_TIMEOUT_S = 60.0


class ChunkStream(Response):
    """Sends chunks until they end or the client goes away; then closes their generator and `cleanup`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        gone: Callable[[], Coroutine[Any, Any, None]],
        cleanup: contextlib.AsyncExitStack,
        headers: Mapping[str, str],
    ) -> None:
        """`gone` returns when the client went away; `cleanup` is closed when the stream has ended, however it did."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks = chunks
        self._gone = gone
        self.cleanup = cleanup
        self._sent = 0  # chunks
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(self._send_all(send), self._tend(send))
        except ClientGone:
            pass
        finally:
            await self._chunks.aclose()
            await self.cleanup.aclose()

    async def _send_all(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        async for chunk in self._chunks:
            self._sending_since = now()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sending_since = None
            self._sent += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tend(self, send: Send) -> None:
        """Keeps an idle connection alive; returns when the client is gone, or takes nothing any more."""
        now = asyncio.get_running_loop().time
        gone = asyncio.ensure_future(self._gone())
        try:
            sent = self._sent
            while not (await asyncio.wait({gone}, timeout=KEEP_ALIVE_S))[0]:
                if self._sending_since is None and self._sent == sent:
                    await send({"type": "http.response.body", "body": b": still there\n\n", "more_body": True})
                elif self._sending_since is not None and now() - self._sending_since > SEND_TIMEOUT_S:
                    return
                sent = self._sent
        finally:
            gone.cancel()
