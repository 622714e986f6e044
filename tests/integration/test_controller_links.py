"""The links that a controller makes: each by the best transport of its ends, the next best where one fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eldric.controller.main import Controller
from eldric.errors import NotReady, Unavailable
from eldric.v1 import pipeline_pb2, stage_pb2
from tests.controllers import MODEL, World, controller_here
from tests.workers import until

READY, DEGRADED = pipeline_pb2.READY, pipeline_pb2.DEGRADED


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[tuple[World, Controller]]:
    """Workers a and b on one host, c on another; a and c are on a fabric."""
    async with controller_here(tmp_path) as (made, controller):
        await made.add_store()
        await made.add_workers("a", transports=("shm", "ucx", "zmq"), host="h1")
        await made.add_workers("b", transports=("shm", "zmq"), host="h1")
        await made.add_workers("c", transports=("shm", "ucx", "zmq"), host="h2")
        yield made, controller


@pytest.fixture
def world(here: tuple[World, Controller]) -> World:
    return here[0]


def links(info: pipeline_pb2.PipelineInfo) -> list[tuple[int, str, str]]:
    """Receiver, transport and reason to fall back of each link."""
    return [(stage.link.to_stage, stage.link.transport, stage.link.fallback) for stage in info.stages]


def last_told(world: World, name: str) -> Any:
    return world.workers[name].called("Connect")[-1]


async def test_each_link_goes_by_the_best_transport_of_its_ends(world: World) -> None:
    events = await world.calls.deploy(stages=3)
    planned = [list(stage.transports) for stage in events[0].plan.stages]
    assert planned == [["shm", "zmq"], ["zmq"], ["ucx", "zmq"]]
    assert links(events[-1].ready) == [(1, "shm", ""), (2, "zmq", ""), (0, "ucx", "")]
    told = {name: last_told(world, name) for name in "abc"}
    assert [told[name].next.address for name in "abc"] == ["shm://b:1", "zmq://c:2", "ucx://a:0"]
    assert [list(told[name].allowed_keys) for name in "abc"] == [["ucx-key-c-2"], ["shm-key-a-0"], ["key-b-1"]]
    assert {request.round for request in told.values()} == {0}  # nothing had to be done twice


async def test_stages_whose_links_are_alike_are_asked_only_once(world: World) -> None:
    await world.calls.deploy(stages=3, transport="zmq")
    assert not any(worker.called("OpenLinks") for worker in world.workers.values())
    assert [transport for _, transport, _ in links(await world.calls.status())] == ["zmq"] * 3


@pytest.mark.parametrize("wish", ["", "auto"])
async def test_a_link_whose_transport_cannot_be_opened_falls_back_and_says_why(world: World, wish: str) -> None:
    world.workers["a"].unopened["ucx"] = "no such device"
    info = (await world.calls.deploy(stages=3, transport=wish))[-1].ready
    assert links(info) == [(1, "shm", ""), (2, "zmq", ""), (0, "zmq", "ucx failed: a: no such device")]
    assert links(await world.calls.status()) == links(info)


async def test_a_link_that_does_not_reach_falls_back_and_the_ring_is_connected_again(world: World) -> None:
    world.workers["a"].unreachable["shm"] = "refused"
    info = (await world.calls.deploy(stages=3))[-1].ready
    assert (info.state, links(info)[0]) == (READY, (1, "zmq", "shm failed: refused"))
    assert {last_told(world, name).round for name in "abc"} == {1}
    first, last = world.workers["a"].called("Connect")
    assert first.try_ms and not last.try_ms  # type: ignore[attr-defined]


async def test_a_link_without_any_transport_left_ends_the_deploy_with_every_reason(world: World) -> None:
    world.workers["a"].unreachable |= {"shm": "refused", "zmq": "a firewall"}
    with pytest.raises(Unavailable, match="stage 0 on a: shm failed: refused; zmq failed: a firewall"):
        await world.calls.deploy(stages=3)
    assert world.stages() == []


async def test_a_transport_that_was_asked_for_is_not_fallen_back_from(world: World) -> None:
    world.workers["a"].unreachable["shm"] = "refused"
    with pytest.raises(Unavailable, match="stage 0 on a: refused"):
        await world.calls.deploy(stages=2, workers=["a", "b"], transport="shm")
    with pytest.raises(NotReady, match="b and c are not on one host, which shm needs"):
        await world.calls.deploy(stages=3, transport="shm")
    assert world.stages() == []


async def test_a_ring_is_mended_by_the_transports_that_it_has(world: World) -> None:
    world.workers["a"].unreachable["shm"] = "refused"
    before = (await world.calls.deploy(stages=3))[-1].ready
    connects = len(world.workers["a"].called("Connect"))
    world.workers["b"].change(stage_pb2.BROKEN, "its neighbour is gone")
    await until(lambda: len(world.workers["a"].called("Connect")) > connects)
    info = await world.calls.wait_for(READY)
    assert links(info) == links(before)  # with the reason, and without another try of what had failed
    assert len(world.workers["a"].called("Connect")) == connects + 1


async def test_a_ring_whose_transport_fails_when_it_is_mended_falls_back(world: World) -> None:
    await world.calls.deploy(stages=3)
    world.workers["c"].unreachable["ucx"] = "the cable is out"
    world.workers["b"].change(stage_pb2.BROKEN, "its neighbour is gone")
    await until(lambda: world.workers["c"].called("Connect")[-1].fallback)  # type: ignore[attr-defined]
    await world.calls.wait_for(READY)
    async with asyncio.timeout(15):  # a worker tells of its links with its next beat, which Watch does not say
        while links(await world.calls.status())[2] != (0, "zmq", "ucx failed: the cable is out"):
            await asyncio.sleep(0.02)


async def test_links_are_shown_over_rest(here: tuple[World, Controller]) -> None:
    world, controller = here
    await world.calls.deploy(stages=3)
    tls = world.authority.issue_identity("client", "tester").client_context()
    async with httpx.AsyncClient(base_url=controller.node.http_url, verify=tls, timeout=10) as http:
        (pipeline,) = (await http.get("/api/v1/pipeline/status", params={"name": MODEL})).json()["pipelines"]
    link = pipeline["stages"][0]["link"]
    assert {"to_stage": 1, "transport": "shm", "encryption": "curve", "frames": 7}.items() <= link.items()
