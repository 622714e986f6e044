"""The edge's join port: connections of nodes without a certificate, led on to a controller's.

They are encrypted end to end; the joiner compares the authority with its token, so the edge cannot stand in between.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from eldric.accepting import ONE_AT_A_TIME, queueing
from eldric.config import NodeConfig
from eldric.errors import EldricError
from eldric.web import bind

log = logging.getLogger(__name__)

#: Longest life of a connection, in seconds, and most bytes of one in each direction: joining is a few messages.
LIFE_S = 30.0
MAX_BYTES = 256 * 1024

_CHUNK_BYTES = 16 * 1024


class JoinDoor:
    """Listens, and leads each connection on."""

    def __init__(
        self, config: NodeConfig, target: Callable[[], Coroutine[Any, Any, tuple[str, int]]], joiners: int, refused: Any
    ) -> None:
        """refused: a counter."""
        self._config = config
        self._target = target
        self._joiners = joiners
        self._refused = refused
        self._busy: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises AddressInUse."""
        bound = bind(self._config.host, self._config.join_port, "--join-port")
        self._server = queueing(await asyncio.start_server(self._serve, sock=bound, backlog=ONE_AT_A_TIME), 100)

    @property
    def address(self) -> str:
        """ "host:port" by which others reach it."""
        if self._server is None:
            return ""
        return self._config.advertised(int(self._server.sockets[0].getsockname()[1]))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._busy) >= self._joiners or task is None:
            self._refused.inc()
            writer.transport.abort()
            return
        self._busy.add(task)
        other: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(LIFE_S):
                host, port = await self._target()
                inner, other = await asyncio.open_connection(host, port)
                await asyncio.gather(_copy(reader, other), _copy(inner, writer))
        except (OSError, TimeoutError, EldricError) as error:
            log.info("event=join_refused error=%r", str(error) or "too slow")
            self._refused.inc()
        finally:
            self._busy.discard(task)
            for each in (writer, other):
                if each is not None:
                    each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the connection's end, or MAX_BYTES."""
    left = MAX_BYTES
    while left > 0 and (data := await reader.read(min(_CHUNK_BYTES, left))):
        writer.write(data)
        await writer.drain()
        left -= len(data)
    with contextlib.suppress(OSError):
        writer.write_eof()
