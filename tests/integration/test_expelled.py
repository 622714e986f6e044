"""A member that was expelled: its certificate holds for weeks yet, and is good for nothing."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from eldric.channels import call_errors, channel
from eldric.errors import InvalidRequest, PermissionDenied
from eldric.security import Identity, JoinToken, join, renew
from eldric.v1 import membership_pb2, model_store_pb2, pipeline_pb2, registry_pb2
from eldric.v1.model_store_pb2_grpc import ModelStoreStub
from eldric.v1.registry_pb2_grpc import RegistryStub
from tests.controllers import MODEL, World, controller_here
from tests.edges import edge_here, tunnel_to
from tests.workers import until


async def expel(world: World, node_id: str) -> list[str]:
    with call_errors():
        answer = await world.calls.membership.Expel(membership_pb2.ExpelRequest(node_id=node_id))
    return list(answer.expelled)


async def test_an_expelled_node_is_let_in_nowhere(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, controller):
        store = await world.add_store()
        await world.add_workers("w1", "w2")
        thief = world.authority.issue_identity("worker", "w1")
        tls = thief.client_context()
        async with (
            channel(store.node.grpc_address, thief, "data") as at_store,
            channel(world.address, thief, "controller") as at_controller,
            httpx.AsyncClient(verify=tls, base_url=store.node.http_url, trust_env=False) as client,
        ):
            models: Any = ModelStoreStub(at_store)
            registry: Any = RegistryStub(at_controller)
            content = f"/api/v1/models/{MODEL}/content"
            await models.List(model_store_pb2.ListModelsRequest())
            assert (await client.get(content)).status_code == 200
            watch = registry.Watch(registry_pb2.WatchNodesRequest())
            await watch.read()

            assert await expel(world, "worker/w1") == ["worker/w1"]
            with pytest.raises(grpc.aio.AioRpcError):  # what ran has ended
                async with asyncio.timeout(5):
                    while await watch.read() is not grpc.aio.EOF:
                        pass
            await until(lambda: "worker/w1" in store.node.expelled.node_ids)
            with pytest.raises(PermissionDenied, match="worker/w1 was expelled"), call_errors():
                await models.List(model_store_pb2.ListModelsRequest())
            assert (await client.get(content)).status_code == 403
            assert (await client.get("/api/v1/models/registry")).status_code == 403
            with pytest.raises(PermissionDenied, match="was expelled"), call_errors():
                await registry.List(registry_pb2.ListNodesRequest())
            with pytest.raises(PermissionDenied, match="was expelled"):
                await renew(world.address, thief)
            made = await world.calls.membership.CreateToken(membership_pb2.CreateTokenRequest(unlimited=True))
            token = JoinToken.parse(made.token)
            with pytest.raises(PermissionDenied, match="under another name"):
                await join(controller.node.join_address, token, "worker", "w1")
            await join(controller.node.join_address, token, "worker", "w3")
        await asyncio.sleep(0)
        assert await world.calls.nodes() == {"w2": "UP"}


async def test_it_stays_expelled_when_the_controller_starts_again(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, _):
        await expel(world, "router/r1")
    async with controller_here(tmp_path) as (world, controller):
        assert await expel(world, "") == ["router/r1"]
        with pytest.raises(PermissionDenied, match="was expelled"):
            await renew(controller.node.grpc_address, world.authority.issue_identity("router", "r1"))


async def test_its_tunnel_ends_and_does_not_come_back(tmp_path: Path) -> None:
    async with (
        controller_here(tmp_path) as (world, _),
        edge_here(world.authority, tmp_path, world.address) as edge,
        tunnel_to(world.authority, edge.node.grpc_address) as tunnel,
    ):
        await edge.member.registered.wait()
        assert [status.node_id for status in edge.tunnels.statuses()] == ["worker/w1"]
        await expel(world, "worker/w1")
        await until(lambda: edge.tunnels.statuses() == [])
        assert not tunnel.connected


async def test_an_operator_is_expelled_by_another(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, _):
        second: Identity = world.authority.issue_identity("client", "second")
        assert await expel(world, "client/second") == ["client/second"]
        async with channel(world.address, second, "controller") as connection:
            registry: Any = RegistryStub(connection)
            with pytest.raises(PermissionDenied, match="client/second was expelled"), call_errors():
                await registry.List(registry_pb2.ListNodesRequest())


@pytest.mark.parametrize("node_id", ["client/tester", "controller/main", "w1", "worker/", "boss/w1", "worker/../x"])
async def test_some_cannot_be_expelled(tmp_path: Path, node_id: str) -> None:
    async with controller_here(tmp_path) as (world, _):
        with pytest.raises(InvalidRequest):
            await expel(world, node_id)
        assert await expel(world, "") == []


async def test_a_pipeline_loses_the_stage_of_an_expelled_worker(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, _):
        await world.add_store()
        await world.add_workers("w1", "w2")
        await world.calls.deploy(stages=2)
        await expel(world, "worker/w2")
        info = await world.calls.wait_for(pipeline_pb2.DEGRADED)
        assert "w2" in info.message
        await world.calls.deploy(stages=2, name="again")
        assert {stage.worker for stage in (await world.calls.status("again")).stages} == {"w1"}
