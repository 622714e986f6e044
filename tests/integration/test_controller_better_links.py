"""Links that have not the best transport get it as soon as it can be had and nothing runs, and until then go on."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eldric.v1 import pipeline_pb2, stage_pb2
from tests.controllers import World, controller_here
from tests.workers import until

READY = pipeline_pb2.READY
BESIDE, SWITCH, NOW = stage_pb2.BESIDE, stage_pb2.SWITCH, stage_pb2.NOW

#: When better links are tried first; the controller looks every fifth of a second.
SOON_S = 0.2


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Workers a and b on one host, c on another; a and c are on a fabric."""
    async with controller_here(tmp_path, better_links_s=SOON_S) as (made, _):
        await made.add_store()
        await made.add_workers("a", transports=("shm", "ucx", "zmq"), host="h1")
        await made.add_workers("b", transports=("shm", "zmq"), host="h1")
        await made.add_workers("c", transports=("shm", "ucx", "zmq"), host="h2")
        yield made


def links(info: pipeline_pb2.PipelineInfo) -> list[tuple[str, str]]:
    """Transport of each link, and why it fell back."""
    return [(stage.link.transport, stage.link.fallback) for stage in info.stages]


def phases(world: World, name: str) -> list[int]:
    """Of the calls to connect that a worker got."""
    calls: Any = world.workers[name].called("Connect")
    return [request.phase for request in calls]


async def until_links(world: World, *schemes: str) -> pipeline_pb2.PipelineInfo:
    async with asyncio.timeout(10):
        while True:
            info = await world.calls.status()
            if tuple(scheme for scheme, _ in links(info)) == schemes:
                return info
            await asyncio.sleep(0.05)


async def test_a_link_that_fell_back_returns_when_it_works_again_and_the_ring_is_never_broken(world: World) -> None:
    world.workers["a"].unreachable["shm"] = "refused"
    info = (await world.calls.deploy(stages=3))[-1].ready
    assert links(info) == [("zmq", "shm failed: refused"), ("zmq", ""), ("ucx", "")]
    seen: list[int] = []

    async def watch() -> None:
        async for event in world.calls.pipeline.Watch(pipeline_pb2.WatchPipelinesRequest()):
            seen.append(event.pipeline.state)

    watching = asyncio.create_task(watch())
    await until(lambda: phases(world, "a").count(BESIDE) >= 2)  # in vain
    assert links(await world.calls.status()) == links(info) and SWITCH not in phases(world, "a")
    del world.workers["a"].unreachable["shm"]
    better = await until_links(world, "shm", "zmq", "ucx")
    assert not any(fallback for _, fallback in links(better))
    assert (better.state, better.epoch) == (READY, info.epoch)
    assert [phases(world, name)[-1] for name in "abc"] == [SWITCH] * 3
    assert [phases(world, name).count(NOW) for name in "abc"] == [2] * 3  # as the deployment was made
    for name in "abc":  # what was left open
        await until(lambda name=name: not world.workers[name].called("OpenLinks")[-1].receive)  # type: ignore[misc, attr-defined]
    watching.cancel()
    assert set(seen) == {READY}


async def test_a_transport_that_can_be_opened_by_now_is_taken(world: World) -> None:
    world.workers["a"].unopened["ucx"] = "no such device"
    await world.calls.deploy(stages=3)
    assert links(await world.calls.status())[2] == ("zmq", "ucx failed: a: no such device")
    world.workers["a"].unopened["ucx"] = "still none"
    await until(lambda: world.workers["a"].called("OpenLinks")[-1].beside)  # type: ignore[attr-defined]
    del world.workers["a"].unopened["ucx"]
    await until_links(world, "shm", "zmq", "ucx")


async def test_a_ring_whose_head_is_busy_is_left_alone_until_it_is_not(world: World) -> None:
    world.workers["a"].unreachable["shm"] = "refused"
    await world.calls.deploy(stages=3)
    (status,) = world.workers["a"].stages.values()
    status.slots_used = 1
    world.workers["a"].member.beat_now()
    await until(lambda: phases(world, "a"))
    del world.workers["a"].unreachable["shm"]
    await asyncio.sleep(4 * SOON_S)
    assert set(phases(world, "a")) == {NOW}  # nothing is tried while sequences run
    world.workers["a"].busy = True  # somebody comes between the look and the switch
    status.slots_used = 0
    world.workers["a"].member.beat_now()
    await until(lambda: SWITCH in phases(world, "a"))
    assert SWITCH not in phases(world, "b") and links(await world.calls.status())[0][0] == "zmq"
    world.workers["a"].busy = False
    await until_links(world, "shm", "zmq", "ucx")


async def test_a_ring_that_has_the_best_links_or_those_that_were_asked_for_is_left_alone(world: World) -> None:
    await world.calls.deploy(stages=3, name="best")
    await world.calls.deploy(stages=3, name="asked", transport="zmq")
    calls = {name: len(world.workers[name].calls) for name in "abc"}
    await asyncio.sleep(5 * SOON_S)
    assert calls == {name: len(world.workers[name].calls) for name in "abc"}
