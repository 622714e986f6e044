"""An edge with real sockets: tunnels that break and come back, and callers with bad intentions."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eldric import PROTOCOL
from eldric.channels import call_errors, channel
from eldric.edge.main import Edge
from eldric.errors import (
    InvalidRequest,
    NotReady,
    PermissionDenied,
    QueueIsFull,
    Unavailable,
    VersionMismatch,
)
from eldric.names import split_address
from eldric.security import Authority, Identity
from eldric.tunnel.client import CONTROLLER, TunnelClient
from eldric.tunnel.limits import TunnelLimits
from eldric.v1 import registry_pb2, registry_pb2_grpc, tunnel_pb2, tunnel_pb2_grpc
from tests.edges import Way, edge_here, tunnel_to, world_and_edge
from tests.workers import until

MIB = 1 << 20


@dataclass
class Behind:
    """An edge, a way to it, a node's tunnel, and an echo server of that node with its connections."""

    authority: Authority
    edge: Edge
    way: Way
    tunnel: TunnelClient
    port: int
    inside: list[asyncio.StreamWriter]

    @property
    def status(self) -> tunnel_pb2.TunnelStatus:
        (status,) = self.edge.tunnels.statuses()
        return status

    def refused(self, what: str) -> float:
        return refused(self.edge, what)


@contextlib.asynccontextmanager
async def behind(folder: Path, **settings: Any) -> AsyncIterator[Behind]:
    """A node behind an edge that knows no cluster. settings: fields of EdgeConfig."""
    authority = Authority.create("test")
    async with (
        edge_here(authority, folder, "127.0.0.1:1", **settings) as edge,
        Way(edge.node.grpc_address) as way,
        tunnel_to(authority, way.address) as tunnel,
        echo() as (port, inside),
    ):
        yield Behind(authority, edge, way, tunnel, port, inside)


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """A server that sends back what it gets: its port, and its connections."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1]), connections
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*split_address(address))


async def there_and_back(address: str, data: bytes) -> bytes:
    """What comes back of `data`; the end of what is sent is said."""
    reader, writer = await connect(address)

    async def send() -> None:
        for start in range(0, len(data), 1 << 16):
            writer.write(data[start : start + (1 << 16)])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        sending.cancel()
        writer.close()


def pattern(size: int) -> bytes:
    """Bytes of which no two places look alike."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4))


def refused(edge: Edge, what: str) -> float:
    return edge.node.metrics.get_sample_value("eldric_edge_refused_total", {"what": what}) or 0.0


@pytest.mark.parametrize("broken", ["dropped", "silent"])
async def test_a_short_gap_loses_and_repeats_nothing(tmp_path: Path, broken: str) -> None:
    """Three of them while a connection carries bytes both ways."""
    data = pattern(6 * MIB)
    async with behind(tmp_path) as there:
        address = await there.tunnel.expose("127.0.0.1", there.port)
        working = asyncio.create_task(there_and_back(address, data))
        for streams in (2, 3, 4):
            mark = there.status.sent_bytes + 200_000
            await until(lambda mark=mark: there.status.sent_bytes > mark)  # type: ignore[misc]
            if broken == "dropped":
                there.way.drop()
            else:
                there.way.cut()
            await until(lambda: not there.tunnel.connected)
            there.way.mend()
            await until(lambda streams=streams: there.status.streams == streams)  # type: ignore[misc]
        assert await working == data
        assert there.edge.node.metrics.get_sample_value("eldric_edge_streams_total", {"how": "resumed"}) == 3


async def test_a_long_gap_closes_the_connections_and_the_node_comes_back_at_the_same_address(tmp_path: Path) -> None:
    async with behind(tmp_path) as there:
        address = await there.tunnel.expose("127.0.0.1", there.port)
        reader, writer = await connect(address)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        there.way.cut()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await until(lambda: there.edge.tunnels.statuses() == [])
        await until(lambda: there.inside[0].transport.is_closing())
        with pytest.raises(ConnectionRefusedError):
            await connect(address)
        there.way.mend()
        await until(lambda: any(address in status.ports for status in there.edge.tunnels.statuses()))
        assert await there_and_back(address, b"again") == b"again"


async def test_a_server_that_reads_nothing_holds_one_window(tmp_path: Path) -> None:
    """And another channel of the same tunnel goes on."""
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with behind(tmp_path) as there:
        stuck = await there.tunnel.expose("127.0.0.1", int(server.sockets[0].getsockname()[1]))
        free = await there.tunnel.expose("127.0.0.1", there.port)
        _, writer = await connect(stuck)
        writer.write(bytes(64 * MIB))
        await until(lambda: there.status.sent_bytes >= MIB)
        assert await there_and_back(free, pattern(MIB)) == pattern(MIB)
        assert there.status.sent_bytes < 16 * MIB  # a window, what the system's buffers take, and the other channel
        writer.transport.abort()
        held[0].transport.abort()
        server.close()


async def test_nodes_behind_one_edge_reach_each_other_and_the_controller(tmp_path: Path) -> None:
    async with (
        world_and_edge(tmp_path) as (world, edge),
        echo() as (port, _),
        tunnel_to(world.authority, edge.node.grpc_address, "w1") as one,
        tunnel_to(world.authority, edge.node.grpc_address, "w2") as two,
    ):
        address = await one.expose("127.0.0.1", port)
        assert await there_and_back(await two.reach(address), b"hello") == b"hello"
        identity = world.authority.issue_identity("worker", "w2")
        async with channel(await two.reach(CONTROLLER), identity, "controller") as connection:
            stub = registry_pb2_grpc.RegistryStub(connection)
            assert len((await stub.List(registry_pb2.ListNodesRequest(), timeout=5)).nodes) == 2


async def test_a_tunnel_leads_to_nodes_of_the_cluster_and_nowhere_else(tmp_path: Path) -> None:
    async with (
        world_and_edge(tmp_path) as (world, edge),
        echo() as (port, _),
        tunnel_to(world.authority, edge.node.grpc_address) as tunnel,
    ):
        with contextlib.suppress(ConnectionError):
            assert await there_and_back(await tunnel.reach(f"127.0.0.1:{port}"), b"hello") == b""
        assert refused(edge, "address") == 1
        own = registry_pb2.Node(id="worker/w1", kind=registry_pb2.WORKER, grpc_address=f"127.0.0.1:{port}")
        own.name, own.incarnation, own.protocol = "w1", 1, PROTOCOL
        await world.calls.registry.Register(registry_pb2.RegisterRequest(node=own))
        await until(lambda: edge.targets.knows("worker/w1"))  # what it says of itself opens nothing
        with contextlib.suppress(ConnectionError):
            assert await there_and_back(await tunnel.reach(f"127.0.0.1:{port}"), b"hello") == b""
        await world.add_workers("w7")  # its tensor ports are free ports of its machine
        await until(lambda: edge.targets.knows("worker/w7"))
        assert await there_and_back(await tunnel.reach(f"127.0.0.1:{port}"), b"hello") == b"hello"


async def open_tunnel(address: str, identity: Identity, *messages: tunnel_pb2.TunnelMessage) -> None:
    """A tunnel that begins so, until the error that ends it."""

    async def say() -> AsyncIterator[tunnel_pb2.TunnelMessage]:
        for message in messages:
            yield message
        await asyncio.sleep(1.0)

    async with channel(address, identity, "edge") as connection:
        with call_errors("edge"):
            async for _ in tunnel_pb2_grpc.TunnelStub(connection).Open(say()):
                pass


def hello(protocol: int = PROTOCOL, session: bytes = b"", received: int = 0) -> tunnel_pb2.TunnelMessage:
    return tunnel_pb2.TunnelMessage(received=received, hello=tunnel_pb2.TunnelHello(protocol=protocol, session=session))


async def test_what_is_no_tunnel_is_refused_and_counted(tmp_path: Path) -> None:
    authority = Authority.create("test")
    worker = authority.issue_identity("worker", "w1")
    data = tunnel_pb2.ChannelData(channel=1, data=b"x")
    async with edge_here(authority, tmp_path, "127.0.0.1:1", tunnels=1) as edge:
        address = edge.node.grpc_address
        with pytest.raises(InvalidRequest, match="begins with a hello"):
            await open_tunnel(address, worker, tunnel_pb2.TunnelMessage(number=1, data=data))
        with pytest.raises(VersionMismatch):
            await open_tunnel(address, worker, hello(protocol=PROTOCOL + 1))
        with pytest.raises(InvalidRequest, match="channel 1"):
            await open_tunnel(address, worker, hello(), tunnel_pb2.TunnelMessage(number=1, data=data))
        with pytest.raises(InvalidRequest, match="acknowledged"):
            await open_tunnel(address, worker, hello(received=5))
        assert edge.tunnels.statuses() == []
        assert refused(edge, "tunnel") == 4
        with pytest.raises(PermissionDenied):
            await open_tunnel(address, authority.issue_identity("controller", "c"), hello())
        with pytest.raises(Unavailable):  # the handshake
            await open_tunnel(address, Authority.create("other").issue_identity("worker", "w1"), hello())


async def test_a_session_cannot_be_taken_over_by_another_node(tmp_path: Path) -> None:
    async with behind(tmp_path) as there:
        address = await there.tunnel.expose("127.0.0.1", there.port)
        thief = there.authority.issue_identity("worker", "thief")
        with pytest.raises(PermissionDenied, match="another node's"):
            await open_tunnel(there.edge.node.grpc_address, thief, hello(session=there.tunnel.session_id))
        assert there.refused("tunnel") == 1
        assert await there_and_back(address, b"still here") == b"still here"


async def test_tunnels_channels_and_ports_are_bounded(tmp_path: Path) -> None:
    async with behind(tmp_path, tunnels=1, limits=TunnelLimits(channels=4, ports=1, port_channels=2)) as there:
        with pytest.raises(QueueIsFull):
            await open_tunnel(there.edge.node.grpc_address, there.authority.issue_identity("worker", "w2"), hello())
        address = await there.tunnel.expose("127.0.0.1", there.port)
        with pytest.raises(NotReady, match="as many ports"):
            await there.tunnel.expose("127.0.0.1", there.port)
        kept = [await connect(address) for _ in range(2)]
        await until(lambda: there.status.channels == 2)
        reader, writer = await connect(address)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        for each in (writer, *(other for _, other in kept)):
            each.close()
        await until(lambda: there.status.channels == 0)
        assert await there_and_back(address, b"room again") == b"room again"


async def test_a_restarted_node_takes_its_place(tmp_path: Path) -> None:
    """The session of the process before is over at once, not only after the gap."""
    async with behind(tmp_path) as there:
        there.way.cut()  # as if the process were gone
        async with tunnel_to(there.authority, there.edge.node.grpc_address, "w1") as tunnel:
            assert tunnel.session_id != there.tunnel.session_id
            assert len(there.edge.tunnels.statuses()) == 1
            reason = {"reason": "the node began a new session"}
            assert there.edge.node.metrics.get_sample_value("eldric_edge_sessions_over_total", reason) == 1


async def test_tunnels_are_shown(tmp_path: Path) -> None:
    """Over gRPC to operators; the counters to Prometheus, which never go back."""
    async with behind(tmp_path) as there:
        address = await there.tunnel.expose("127.0.0.1", there.port)
        assert await there_and_back(address, b"12345") == b"12345"
        operator = there.authority.issue_identity("client", "tester")
        async with channel(there.edge.node.grpc_address, operator, "edge") as connection:
            stub = tunnel_pb2_grpc.TunnelStub(connection)
            (status,) = (await stub.Tunnels(tunnel_pb2.ListTunnelsRequest(), timeout=5)).tunnels
        assert (status.node_id, status.connected, list(status.ports)) == ("worker/w1", True, [address])
        assert (status.sent_bytes, status.received_bytes, status.channels_total) == (5, 5, 1)
        value = there.edge.node.metrics.get_sample_value
        assert value("eldric_edge_tunnels", {"state": "connected"}) == 1
        assert value("eldric_edge_bytes_total", {"direction": "to_node"}) == 5
        await there.tunnel.close()
        await until(lambda: there.edge.tunnels.statuses() == [])
        assert value("eldric_edge_bytes_total", {"direction": "to_node"}) == 5
