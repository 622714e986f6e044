"""Tensor frames between two nodes behind an edge, through both their tunnels."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eldric.edge.main import Edge
from eldric.security import Authority
from eldric.transport.base import Link, Transport
from eldric.transport.errors import ConnectFailed, ListenFailed, PeerLost, QueueFull
from tests.edges import TunnelRelay, Way, edge_here, tunnel_to
from tests.transports import QUICK, make_transport, numbered, peer_of, receive
from tests.workers import until

#: Longer than these tests cut a tunnel.
PATIENT = replace(QUICK, relay_silence_s=5.0)


@dataclass
class Relayed:
    """Stage 0, its link to stage 1, and stage 1; each has a tunnel of its own."""

    edge: Edge
    way: Way
    sender: Transport
    link: Link
    receiver: Transport

    def exchange(self, count: int, size: int = 1000) -> None:
        """Frames one after the other, each of which must arrive before the next is sent."""
        for number in range(1, count + 1):
            self.link.send(numbered(number), bytes([number % 251]) * size, timeout=5)
            frame = receive(self.receiver, 8)
            assert frame.header.step == number
            assert frame.payload == bytes([number % 251]) * size


@contextlib.asynccontextmanager
async def relayed(folder: Path) -> AsyncIterator[Relayed]:
    authority = Authority.create("test")
    async with (
        edge_here(authority, folder, "127.0.0.1:1") as edge,
        Way(edge.node.grpc_address) as way,
        tunnel_to(authority, edge.node.grpc_address, "w0") as first,
        tunnel_to(authority, way.address, "w1") as second,
    ):
        relays = TunnelRelay(first), TunnelRelay(second)
        ends = [make_transport("relay", stage, replace(PATIENT, relay=relays[stage])) for stage in (0, 1)]
        sender, receiver = ends
        try:
            receiver.allow([sender.public_key])
            address = await asyncio.to_thread(receiver.listen)
            link = await asyncio.to_thread(sender.connect, peer_of(receiver, address))
            yield Relayed(edge, way, sender, link, receiver)
        finally:
            for end in ends:
                await asyncio.to_thread(end.close)


async def test_frames_of_all_sizes_arrive_in_order_and_encrypted(tmp_path: Path) -> None:
    async with relayed(tmp_path) as there:
        await asyncio.to_thread(there.exchange, 50)
        await asyncio.to_thread(there.exchange, 3, 6 << 20)
        assert there.receiver.encryption == "curve"
        assert there.link.stats.round_trip_s == 0.0  # the kernel knows of a part of the way only
        assert {status.node_id for status in there.edge.tunnels.statuses()} == {"worker/w0", "worker/w1"}
        assert all(status.sent_bytes + status.received_bytes > 18 << 20 for status in there.edge.tunnels.statuses())


async def test_a_gap_costs_neither_frames_nor_the_link(tmp_path: Path) -> None:
    async with relayed(tmp_path) as there:
        working = asyncio.create_task(asyncio.to_thread(there.exchange, 400, 16 << 10))
        await until(lambda: there.link.stats.frames > 50)
        there.way.cut()
        await asyncio.sleep(0.9)
        there.way.mend()
        await working
        assert there.link.closed is None
        assert max(status.streams for status in there.edge.tunnels.statuses()) == 2


async def test_a_receiver_that_takes_nothing_fills_the_queue_and_not_the_edge(tmp_path: Path) -> None:
    def fill(link: Link) -> int:
        for number in range(1, 1000):
            try:
                link.send(numbered(number), bytes(100_000), timeout=0.5)
            except QueueFull:
                return number
        raise AssertionError("no bound")

    async with relayed(tmp_path) as there:
        frames = await asyncio.to_thread(fill, there.link)
        assert frames <= PATIENT.queue_frames + 1
        assert all(status.kept_bytes <= PATIENT.queue_frames * 110_000 for status in there.edge.tunnels.statuses())
        assert (await asyncio.to_thread(receive, there.receiver)).header.step == 1


async def test_a_tunnel_that_does_not_come_back_loses_the_peer(tmp_path: Path) -> None:
    """Noticed when the session is over, not when the silence is."""

    def lost(transport: Transport) -> bool:
        began = time.monotonic()
        while time.monotonic() - began < PATIENT.relay_silence_s:
            try:
                transport.recv(1.0)
            except PeerLost:
                return True
        return False

    async with relayed(tmp_path) as there:
        await asyncio.to_thread(there.exchange, 3)
        there.way.cut()
        assert await asyncio.to_thread(lost, there.sender)
        assert there.link.closed is not None
        there.way.mend()


class Broken:
    """A tunnel that is not there."""

    def expose(self, host: str, port: int) -> str:
        raise OSError("the tunnel is broken")

    def withdraw(self, address: str) -> None:
        raise AssertionError("nothing was exposed")

    def reach(self, address: str) -> str:
        raise OSError("the tunnel is broken")


@pytest.fixture
def stranded() -> Iterator[Transport]:
    with make_transport("relay", 0, replace(QUICK, relay=Broken())) as transport:
        yield transport


def test_a_broken_tunnel_is_a_transport_error(stranded: Transport) -> None:
    with pytest.raises(ListenFailed, match="the edge gives no address: the tunnel is broken"):
        stranded.listen()
    with make_transport("relay", 1) as other, pytest.raises(ConnectFailed, match="no way through the edge"):
        stranded.connect(peer_of(other, other.listen()))
