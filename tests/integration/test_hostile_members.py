"""A member of a cluster, with a good certificate, that means harm."""

from pathlib import Path
from typing import Any

import pytest

from eldric import PROTOCOL
from eldric.channels import call_errors, channel
from eldric.errors import InvalidRequest
from eldric.v1 import heartbeat_pb2, registry_pb2, stage_pb2
from eldric.v1.heartbeat_pb2_grpc import HeartbeatStub
from eldric.v1.registry_pb2_grpc import RegistryStub
from tests.controllers import controller_here


def described(**fields: Any) -> registry_pb2.RegisterRequest:
    """What a worker "bad" says of itself."""
    node = registry_pb2.Node(
        id="worker/bad", name="bad", kind=registry_pb2.WORKER, protocol=PROTOCOL, incarnation=7, **fields
    )
    return registry_pb2.RegisterRequest(node=node)


async def test_no_member_makes_the_registry_too_large_for_the_others(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, _):
        await world.add_workers("good")
        bad = world.authority.issue_identity("worker", "bad")
        devices = [registry_pb2.Device(name="gpu", description="x" * 100)] * 100_000
        async with channel(world.address, bad, "controller") as connection:
            registry: Any = RegistryStub(connection)
            for fields in (
                {"grpc_address": "127.0.0.1:1", "http_url": "https://" + "x" * (30 << 20)},
                {"grpc_address": "127.0.0.1:1", "resources": registry_pb2.Resources(devices=devices)},
            ):
                with pytest.raises(InvalidRequest, match="to describe itself"), call_errors():
                    await registry.Register(described(**fields))
            await registry.Register(described(grpc_address="127.0.0.1:1"))
            stages = [stage_pb2.StageStatus(pipeline_id="x" * 200)] * 20_000
            beat = heartbeat_pb2.BeatRequest(node_id="worker/bad", incarnation=7, sequence=1, stages=stages)
            heartbeat: Any = HeartbeatStub(connection)
            with pytest.raises(InvalidRequest, match="a beat of"), call_errors():
                await heartbeat.Beat(iter([beat])).read()
        assert set(await world.calls.nodes()) == {"good", "bad"}


async def test_a_member_says_nothing_of_stages_that_are_others(tmp_path: Path) -> None:
    """It reports a stage of a pipeline as broken that another worker serves."""
    async with controller_here(tmp_path) as (world, _):
        await world.add_store()
        await world.add_workers("a", "b")
        await world.calls.deploy(stages=2)
        before = await world.calls.status()
        bad = world.authority.issue_identity("worker", "bad")
        async with channel(world.address, bad, "controller") as connection:
            registry: Any = RegistryStub(connection)
            await registry.Register(described(grpc_address="127.0.0.1:1"))
            claimed = [
                stage_pb2.StageStatus(
                    pipeline_id=before.id, index=index, epoch=before.epoch, state=stage_pb2.BROKEN, message="gone"
                )
                for index in (0, 1)
            ]
            heartbeat: Any = HeartbeatStub(connection)
            call = heartbeat.Beat(
                iter([heartbeat_pb2.BeatRequest(node_id="worker/bad", incarnation=7, sequence=1, stages=claimed)])
            )
            answer = await call.read()
            assert list(answer.wanted) == []
        after = await world.calls.status()
        assert (after.state, after.epoch) == (before.state, before.epoch)
        assert [stage.worker for stage in after.stages] == [stage.worker for stage in before.stages]
        assert [stage.state for stage in after.stages] == [stage.state for stage in before.stages]
