"""Processes that die: workers under a controller, and the controller itself, with kill -9."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eldric.errors import NotEnoughMemory, NotFound, NotReady, Unavailable
from eldric.v1 import pipeline_pb2, registry_pb2, stage_pb2
from tests.controllers import ControllerProcess, World, controller_elsewhere, controller_here
from tests.workers import Gate, issue, until

READY, DEGRADED, DEPLOYING = pipeline_pb2.READY, pipeline_pb2.DEGRADED, pipeline_pb2.DEPLOYING

#: A dead process is noticed after some 50 ms; the lease of these tests is 1.5 s. The bound allows for slow machines.
NOTICED_S = 1.0


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Two workers in this process and a store."""
    async with controller_here(tmp_path) as (made, _):
        await made.add_store()
        await made.add_workers("a", "b")
        yield made


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[tuple[World, ControllerProcess]]:
    """Three workers and a store in this process, the controller in another."""
    async with controller_elsewhere(tmp_path) as (made, process):
        await made.add_store()
        await made.add_workers("a", "b", "c")
        yield made, process


@contextlib.asynccontextmanager
async def victim(world: World, name: str = "victim") -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a process of its own, registered."""
    folder = issue(world.authority, world.folder, "worker", name)
    arguments = "-m", "tests.workers", str(folder), world.address, name
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, start_new_session=True)
    try:
        await world.calls.wait_for_node(registry_pb2.WORKER, name)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def test_a_killed_worker_is_lost_at_once_and_the_head_is_told(world: World) -> None:
    watching = world.calls.registry.Watch(registry_pb2.WatchNodesRequest(kind=registry_pb2.WORKER))
    async with victim(world) as process:
        await world.calls.deploy(stages=3)
        began = time.monotonic()
        process.kill()
        async for event in watching:
            if event.node.name == "victim" and event.node.state == registry_pb2.LOST:
                break
        noticed_s = time.monotonic() - began
        await asyncio.wait_for(world.workers["a"].degraded.wait(), 1.0)
        told_s = time.monotonic() - began
    watching.cancel()
    info = await world.calls.status()
    assert (info.state, info.message) == (DEGRADED, "stage 2 of 3 on worker victim is gone: its process has ended")
    assert noticed_s < NOTICED_S and told_s < NOTICED_S, f"noticed after {noticed_s:.3f} s, told after {told_s:.3f} s"


async def test_a_frozen_worker_is_lost_with_its_lease_and_welcome_back(world: World) -> None:
    async with victim(world) as process:
        await world.calls.deploy(stages=3)
        process.send_signal(signal.SIGSTOP)
        info = await world.calls.wait_for(DEGRADED)
        assert info.message.startswith("stage 2 of 3 on worker victim is gone: no beat for")
        process.send_signal(signal.SIGCONT)
        info = await world.calls.wait_for(READY)
        assert (info.epoch, info.message) == (1, "")
        await until(lambda: not world.workers["a"].degraded.is_set())


async def test_a_worker_that_dies_while_others_load_fails_the_deploy_with_its_name(world: World) -> None:
    gate = world.workers["b"].gates["Load"] = Gate()
    async with victim(world) as process:
        deploying = asyncio.create_task(world.calls.deploy(stages=3))
        await gate.arrived.wait()
        process.kill()
        with pytest.raises(Unavailable, match="stage 2 on victim"):
            await deploying
    assert world.stages() == []


async def test_what_a_restarted_worker_held_is_loaded_again_by_itself(world: World) -> None:
    async with victim(world):
        await world.calls.deploy(stages=3)
    await world.calls.wait_for(DEGRADED)
    gate = world.workers["a"].gates["Load"] = Gate()
    async with victim(world):
        await gate.arrived.wait()
        info = await world.calls.wait_for(DEPLOYING)
        assert info.message.startswith("loading again") and info.progress < 1
        with pytest.raises(NotReady, match="is being worked on"):
            await world.calls.rebalance()
        gate.open.set()
        info = await world.calls.wait_for(READY)
        assert (info.epoch, info.message, [stage.worker for stage in info.stages]) == (2, "", ["a", "b", "victim"])
        await until(lambda: world.stages() == [("a", 2, 0), ("b", 2, 1)])
        assert not any(worker.degraded.is_set() for worker in world.workers.values())


async def test_a_load_again_that_fails_is_tried_again_and_says_why(world: World) -> None:
    async with victim(world):
        await world.calls.deploy(stages=3)
    world.workers["b"].failures["Load"] = NotEnoughMemory("7 bytes are missing")
    async with victim(world):
        async with asyncio.timeout(10):
            while "failed 2 times" not in (info := await world.calls.status()).message:
                await asyncio.sleep(0.01)
        assert info.message == (
            "stage 2 of 3 on worker victim is gone: its worker restarted; "
            "loading it again failed 2 times: stage 1 on b: 7 bytes are missing"
        )
        await until(lambda: not world.stages() or len(world.workers["b"].called("Load")) > 3)
        del world.workers["b"].failures["Load"]
        assert (await world.calls.wait_for(READY)).epoch == 2


async def test_an_undeploy_ends_a_load_again(world: World) -> None:
    async with victim(world):
        await world.calls.deploy(stages=3)
    gate = world.workers["a"].gates["Load"] = Gate()
    async with victim(world):
        await gate.arrived.wait()
        await world.calls.undeploy()
        assert world.stages() == []
        with pytest.raises(NotFound):
            await world.calls.status()


async def test_pipelines_of_a_cluster_that_restarted_as_a_whole_are_loaded_again(
    elsewhere: tuple[World, ControllerProcess],
) -> None:
    world, process = elsewhere
    await world.calls.deploy(stages=3)
    await asyncio.gather(*(worker.node.stop() for worker in world.workers.values()))
    await process.kill()
    await process.start()
    assert (await world.calls.status()).state == DEPLOYING
    watching = world.calls.pipeline.Watch(pipeline_pb2.WatchPipelinesRequest())
    await world.add_workers("a", "b", "c")
    states = []
    async for event in watching:
        states.append(event.pipeline.state)
        if event.pipeline.state == READY:
            break
    watching.cancel()
    assert DEGRADED not in states
    assert event.pipeline.epoch == 2 and world.stages() == [("a", 2, 0), ("b", 2, 1), ("c", 2, 2)]


async def test_a_restarted_controller_finds_its_pipelines_running(elsewhere: tuple[World, ControllerProcess]) -> None:
    world, process = elsewhere
    before = (await world.calls.deploy(stages=3))[-1].ready
    calls = {name: len(worker.calls) for name, worker in world.workers.items()}
    await process.kill()
    await process.start()
    info = await world.calls.wait_for(READY)
    assert (info.id, info.epoch, info.created_at) == (before.id, 1, before.created_at)
    assert [stage.worker for stage in info.stages] == ["a", "b", "c"]
    await asyncio.sleep(0.7)  # three answers: nothing is unloaded, nothing was loaded again
    assert world.stages() == [("a", 1, 0), ("b", 1, 1), ("c", 1, 2)]
    loads = {name: len(worker.called("Load")) for name, worker in world.workers.items()}
    assert loads == dict.fromkeys(calls, 1)
    assert not any(worker.degraded.is_set() for worker in world.workers.values())


@pytest.mark.parametrize("method", ["Load", "Connect"])
async def test_a_controller_killed_in_the_middle_of_a_deploy_undoes_it_at_its_start(
    elsewhere: tuple[World, ControllerProcess], method: str
) -> None:
    """Killed while one stage loads, and when all are loaded and one of them is connected."""
    world, process = elsewhere
    await world.calls.deploy(stages=2, name="kept")
    gate = world.workers["c"].gates[method] = Gate()
    deploying = asyncio.create_task(world.calls.deploy(stages=3))
    await gate.arrived.wait()
    if method == "Connect":
        await until(lambda: all(worker.called("Connect") for worker in world.workers.values()))
    await process.kill()
    with pytest.raises(Unavailable):
        await deploying
    gate.open.set()
    await process.start()
    assert (await world.calls.wait_for(READY, "kept")).epoch == 1
    with pytest.raises(NotFound):
        await world.calls.status()
    await until(lambda: world.stages() == [("a", 1, 0), ("b", 1, 1)])
    await world.calls.wait_for_node(registry_pb2.DATA, "store")
    await world.calls.wait_for_node(registry_pb2.WORKER, "c")
    assert (await world.calls.deploy(stages=3))[-1].ready.state == READY


async def test_a_controller_killed_in_the_middle_of_an_undeploy_ends_it_at_its_start(
    elsewhere: tuple[World, ControllerProcess],
) -> None:
    world, process = elsewhere
    await world.calls.deploy(stages=3)
    gate = world.workers["a"].gates["Unload"] = Gate()
    undeploying = asyncio.create_task(world.calls.undeploy())
    await gate.arrived.wait()
    await process.kill()
    with pytest.raises(Unavailable):
        await undeploying
    gate.open.set()
    await process.start()
    with pytest.raises(NotFound):
        await world.calls.status()
    await until(lambda: not world.stages())


async def test_a_controller_killed_in_the_middle_of_a_rebalance_keeps_the_old_stages(
    elsewhere: tuple[World, ControllerProcess],
) -> None:
    world, process = elsewhere
    await world.calls.deploy(stages=4)
    before = world.stages()
    await world.add_workers("d")
    gate = world.workers["d"].gates["Connect"] = Gate()
    moving = asyncio.create_task(world.calls.rebalance())
    await gate.arrived.wait()
    assert len(world.stages()) == 8
    await process.kill()
    with pytest.raises(Unavailable):
        await moving
    gate.open.set()
    await process.start()
    assert (await world.calls.wait_for(READY)).epoch == 1
    await until(lambda: world.stages() == before)
    await world.calls.wait_for_node(registry_pb2.DATA, "store")
    await world.calls.wait_for_node(registry_pb2.WORKER, "d")
    assert all(
        status.state == stage_pb2.SERVING for worker in world.workers.values() for status in worker.stages.values()
    )
    assert (await world.calls.rebalance())[-1].ready.epoch == 2


async def test_a_restarted_controller_degrades_a_pipeline_whose_worker_does_not_come_back(
    elsewhere: tuple[World, ControllerProcess],
) -> None:
    world, process = elsewhere
    await world.calls.deploy(stages=3)
    await process.kill()
    stopping = asyncio.create_task(world.workers["c"].node.stop())
    await process.start()
    info = await world.calls.wait_for(DEGRADED)
    assert info.message == "stage 2 of 3 on worker c is gone: its worker left the cluster"
    await asyncio.wait_for(world.workers["a"].degraded.wait(), 5)
    await stopping
