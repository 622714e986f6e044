"""Nodes that know an edge alone are members of the cluster like any other."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eldric.channels import channel
from eldric.config import NodeConfig
from eldric.errors import PermissionDenied, Unauthenticated, Unavailable
from eldric.member import Member
from eldric.names import split_address
from eldric.node import Node
from eldric.security import Authority, Identity, JoinToken, join
from eldric.v1 import membership_pb2, registry_pb2, stage_pb2
from eldric.worker.range_cache.connection import Connection
from eldric.worker.relay import relay_of
from tests.controllers import MODEL, World, controller_here
from tests.edges import edge_here, world_and_edge
from tests.models import storyteller
from tests.workers import issue, until


@contextlib.asynccontextmanager
async def worker_behind(world: World, edge: str, folder: Path) -> AsyncIterator[Node]:
    """A registered worker that knows the edge alone."""
    home = issue(world.authority, folder, "worker", "w1")
    node = Node(NodeConfig("worker", "w1", home, http_port=0, grpc_port=0, edge=edge, drain_s=1.0), Identity.load(home))
    member = Member(node)
    await node.start()
    try:
        await asyncio.wait_for(member.registered.wait(), 5)
        yield node
    finally:
        await node.stop()


async def listed(world: World, kind: "registry_pb2.NodeKind.ValueType" = registry_pb2.WORKER) -> registry_pb2.Node:
    """The only node of a kind, as the controller lists it."""
    (node,) = (await world.calls.registry.List(registry_pb2.ListNodesRequest(kind=kind))).nodes
    return node


async def check(world: World, address: str) -> None:
    """It is this very worker that answers there."""
    operator = world.authority.issue_identity("client", "tester")
    async with channel(address, operator, "worker", "w1") as connection:
        answer = await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_others_reach_it_at_the_edge_under_its_own_name(tmp_path: Path) -> None:
    async with world_and_edge(tmp_path) as (world, edge):
        async with worker_behind(world, edge.node.grpc_address, tmp_path):
            node = await listed(world)
            assert node.edge_id == "edge/e1"
            (tunnel,) = edge.tunnels.statuses()
            assert {node.grpc_address, node.http_url.removeprefix("https://")} == set(tunnel.ports)
            await check(world, node.grpc_address)
        assert await world.calls.nodes() == {}
        await until(lambda: edge.tunnels.statuses() == [])


async def test_it_registers_again_when_the_edge_gives_it_another_address(tmp_path: Path) -> None:
    """The edge restarts, and somebody else has the port meanwhile."""
    async with controller_here(tmp_path) as (world, _), contextlib.AsyncExitStack() as stack:
        async with edge_here(world.authority, tmp_path, world.address) as edge:
            address = edge.node.grpc_address
            node = await stack.enter_async_context(worker_behind(world, address, tmp_path))
            before = node.grpc_address
        taken = socket.create_server(split_address(before))
        port = split_address(address)[1]
        async with edge_here(world.authority, tmp_path, world.address, grpc_port=port):
            await until(lambda: node.grpc_address != before)
            async with asyncio.timeout(10):
                while (await listed(world)).grpc_address != node.grpc_address:
                    await asyncio.sleep(0.02)
            await check(world, node.grpc_address)
            await stack.aclose()
        taken.close()


async def test_it_fetches_models_through_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it reaches no data worker itself."""
    monkeypatch.setattr("eldric.worker.relay._connects", lambda address: False)
    async with (
        world_and_edge(tmp_path) as (world, edge),
        worker_behind(world, edge.node.grpc_address, tmp_path) as node,
    ):
        await world.add_store()
        await until(lambda: edge.targets.knows("data/store"))
        relay = relay_of(node)
        assert relay is not None
        await relay.start()
        place = stage_pb2.ModelPlace(node_id="data/store", http_url=(await listed(world, registry_pb2.DATA)).http_url)
        source = await asyncio.to_thread(relay.reachable, stage_pb2.ModelSource(places=[place]))
        assert source.places[0].http_url != place.http_url
        connection = Connection(source.places[0], node.identity.client_context())
        blocks = await asyncio.to_thread(connection.blocks, MODEL)
        assert blocks.files[0].size_bytes == storyteller().stat().st_size
        connection.close()


async def test_a_stranger_joins_through_the_edge(tmp_path: Path) -> None:
    async with world_and_edge(tmp_path) as (world, edge):
        token = (await world.calls.membership.CreateToken(membership_pb2.CreateTokenRequest())).token
        identity = await join(edge.door.address, JoinToken.parse(token), "worker", "fresh")
        assert identity.node_id == "worker/fresh"
        with pytest.raises((Unauthenticated, PermissionDenied)):  # the token is used up
            await join(edge.door.address, JoinToken.parse(token), "worker", "other")


async def test_it_does_not_start_without_its_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eldric.tunnel.client.START_S", 0.5)
    home = issue(Authority.create("test"), tmp_path, "worker", "w1")
    config = NodeConfig("worker", "w1", home, http_port=0, grpc_port=0, edge="127.0.0.1:1", drain_s=1.0)
    with pytest.raises(Unavailable, match=r"the edge at 127\.0\.0\.1:1 is not reached"):
        await Node(config, Identity.load(home)).start()
