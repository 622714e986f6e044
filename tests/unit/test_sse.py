"""A stream of ready chunks: its end, a client that goes away, one that takes nothing, and one that waits."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from eldric.router import sse
from eldric.router.sse import ChunkStream


class Connection:
    """What an ASGI server gives to an application."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await self.may_send.wait()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def until_gone(self) -> None:
        await self.gone.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


class Source:
    """Chunks; None stands for waiting for ever."""

    def __init__(self, *chunks: bytes | None) -> None:
        self.ended = False
        self.cleaned = False
        self._chunks = chunks

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self._chunks:
                if chunk is None:
                    await asyncio.Event().wait()
                else:
                    yield chunk
        finally:
            self.ended = True

    def stream(self, connection: Connection) -> ChunkStream:
        cleanup = contextlib.AsyncExitStack()
        cleanup.callback(lambda: setattr(self, "cleaned", True))
        return ChunkStream(self.run(), connection.until_gone, cleanup, {"x-request-id": "7"})


async def serve(source: Source, connection: Connection) -> None:
    async with asyncio.timeout(5):
        await source.stream(connection)({"type": "http"}, connection.receive, connection.send)
    assert source.ended
    assert source.cleaned
    assert len(asyncio.all_tasks()) == 1


async def test_chunks_are_sent_to_the_end() -> None:
    connection = Connection()
    await serve(Source(b"a", b"b"), connection)
    assert connection.sent[0]["status"] == 200
    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-request-id"] == b"7"
    assert b"content-length" not in headers
    assert connection.bodies == [b"a", b"b", b""]
    assert connection.sent[-1]["more_body"] is False


async def test_a_client_that_goes_away_ends_the_stream() -> None:
    connection = Connection()
    asyncio.get_running_loop().call_later(0.02, connection.gone.set)
    await serve(Source(b"a", None), connection)
    assert connection.bodies == [b"a"]


async def test_an_idle_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    connection = Connection()
    asyncio.get_running_loop().call_later(0.1, connection.gone.set)
    await serve(Source(b"a", None), connection)
    assert connection.bodies[:2] == [b"a", b": still there\n\n"]


async def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.02)
    connection = Connection()

    async def send(message: Any) -> None:
        connection.sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    connection.send = send  # type: ignore[method-assign]
    await serve(Source(b"a", b"b"), connection)
    assert connection.bodies == [b"a"]


async def test_a_stream_that_cannot_begin_is_closed_all_the_same() -> None:
    connection, source = Connection(), Source(b"a")

    async def send(message: Any) -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await source.stream(connection)({"type": "http"}, connection.receive, send)
    assert source.cleaned
