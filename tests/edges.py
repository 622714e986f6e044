"""Edges for tests, in this process; nodes behind them; and a way between the two that breaks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from eldric.config import NodeConfig
from eldric.edge.config import EdgeConfig
from eldric.edge.main import Edge
from eldric.names import join_address, split_address
from eldric.security import Authority
from eldric.tunnel.client import TunnelClient
from eldric.tunnel.limits import TunnelTimes
from tests.controllers import World, controller_here
from tests.workers import issue

#: A tunnel that notices sooner than usual that it is broken, and whose sessions are over sooner.
QUICK = TunnelTimes(pulse_s=0.1, silence_s=0.5, gap_s=1.0, connect_s=1.0, retry_s=0.02, max_retry_s=0.1)


@contextlib.asynccontextmanager
async def edge_here(
    authority: Authority, folder: Path, controller: str, *, grpc_port: int = 0, **settings: Any
) -> AsyncIterator[Edge]:
    """An edge in this process. settings: fields of EdgeConfig."""
    home = issue(authority, folder, "edge", "e1")
    addresses: dict[str, Any] = {"http_port": 0, "grpc_port": grpc_port, "join_port": 0, "controllers": (controller,)}
    node = NodeConfig("edge", "e1", home, drain_s=1.0, **addresses)
    edge = Edge(EdgeConfig(node, **{"times": QUICK, **settings}))
    await edge.node.start()
    try:
        yield edge
    finally:
        await edge.node.stop()


@contextlib.asynccontextmanager
async def world_and_edge(folder: Path, **settings: Any) -> AsyncIterator[tuple[World, Edge]]:
    """A controller and an edge that knows the cluster."""
    async with (
        controller_here(folder) as (world, _),
        edge_here(world.authority, folder, world.address, **settings) as edge,
    ):
        await edge.member.registered.wait()
        yield world, edge


class Way:
    """A forwarding process between a node and its edge, which can be cut: nothing passes, and nobody is told so."""

    def __init__(self, target: str) -> None:
        self._target = split_address(target)
        self._open = asyncio.Event()
        self._open.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.connections = 0

    async def __aenter__(self) -> "Way":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.close()
        self.mend()
        self.drop()

    @property
    def address(self) -> str:
        assert self._server is not None
        return join_address("127.0.0.1", int(self._server.sockets[0].getsockname()[1]))

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def drop(self) -> None:
        """Every connection breaks, so that both ends see it."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self._open.wait()
        try:
            inner, other = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, other]
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pass_on(reader, other), self._pass_on(inner, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def tunnel_to(
    authority: Authority, edge: str, name: str = "w1", kind: str = "worker"
) -> AsyncIterator[TunnelClient]:
    """A node's tunnel, without the node. edge: "host:port"."""
    identity = authority.issue_identity(kind, name)
    client = TunnelClient(edge, lambda: identity, QUICK)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


class TunnelRelay:
    """A tunnel as transports use it, from threads beside the event loop."""

    def __init__(self, tunnel: TunnelClient) -> None:
        self._tunnel, self._loop = tunnel, asyncio.get_running_loop()

    def expose(self, host: str, port: int) -> str:
        return asyncio.run_coroutine_threadsafe(self._tunnel.expose(host, port), self._loop).result(10)

    def withdraw(self, address: str) -> None:
        self._loop.call_soon_threadsafe(self._tunnel.withdraw, address)

    def reach(self, address: str) -> str:
        return asyncio.run_coroutine_threadsafe(self._tunnel.reach(address), self._loop).result(10)
