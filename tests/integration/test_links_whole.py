"""Links from end to end: a controller, a store and real workers that offer different transports, third parties' too."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from eldric.channels import channel
from eldric.client.convert import pipeline as shown
from eldric.config import NodeConfig
from eldric.errors import NotReady, Unavailable
from eldric.transport.registry import load
from eldric.v1 import inference_pb2, pipeline_pb2, stage_pb2
from eldric.v1.inference_pb2_grpc import InferenceStub
from eldric.worker.commands import Degrade
from eldric.worker.config import WorkerConfig
from eldric.worker.main import Worker
from tests.controllers import World, controller_here
from tests.workers import issue, until

pytestmark = pytest.mark.timeout(90)

#: Transports of other people: pigeons work, lame ones leave and do not arrive until they are well, plain ones can be
#: read by anybody.
CARRIERS = """
from eldric.transport.errors import ConnectFailed
from eldric.transport.inproc import InprocTransport

class PigeonTransport(InprocTransport):
    scheme = "pigeon"

class LameTransport(InprocTransport):
    scheme = "lame"
    well = False

    def connect(self, peer, timeout=5.0):
        if not self.well:
            raise RuntimeError("it cannot fly")
        return super().connect(peer, timeout)

class PlainTransport(InprocTransport):
    scheme = "plain"
    encryption = "none"
"""


@pytest.fixture(autouse=True)
def carriers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with these transports, as pip would have installed it."""
    (tmp_path / "carrier_transports.py").write_text(CARRIERS)
    info = tmp_path / "carrier_transports-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier-transports\nVersion: 1.0\n")
    lines = [f"{name} = carrier_transports:{name.title()}Transport" for name in ("pigeon", "lame", "plain")]
    (info / "entry_points.txt").write_text("\n".join(["[eldric.transports]", *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("carrier_transports", None)


Workers = dict[str, Worker]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[tuple[World, Workers]]:
    async with controller_here(tmp_path) as (made, _):
        await made.add_store()
        workers = {
            "a": await start_worker(made, "a", ("lame", "plain", "pigeon", "zmq")),
            "b": await start_worker(made, "b", ("lame", "plain", "pigeon", "zmq")),
            "c": await start_worker(made, "c", ("pigeon", "zmq")),
            "d": await start_worker(made, "d", ("zmq",)),
            "e": await start_worker(made, "e", ("plain", "zmq"), trust_fabric=True),
            "f": await start_worker(made, "f", ("plain", "zmq"), trust_fabric=True),
        }
        try:
            yield made, workers
        finally:
            await asyncio.gather(*(worker.node.stop() for worker in workers.values()))


@pytest.fixture
def world(here: tuple[World, Workers]) -> World:
    return here[0]


async def start_worker(world: World, name: str, transports: Sequence[str], **settings: Any) -> Worker:
    folder = issue(world.authority, world.folder, "worker", name)
    node = NodeConfig("worker", name, folder, http_port=0, grpc_port=0, controllers=(world.address,), drain_s=1.0)
    worker = Worker(WorkerConfig(node, memory_bytes=1 << 30, threads=1, **settings))
    worker._resources.transports[:] = transports
    await worker.node.start()
    await worker._member.registered.wait()
    return worker


async def deploy(world: World, workers: Sequence[str], **fields: Any) -> pipeline_pb2.PipelineInfo:
    options = {"context": 256, "slots": 2, "threads": 1}
    return (await world.calls.deploy(workers=workers, options=options, **fields))[-1].ready


async def tokens(world: World, info: pipeline_pb2.PipelineInfo) -> list[int]:
    """What the pipeline generates greedily."""
    caller = world.authority.issue_identity("router", "tester")
    request = inference_pb2.GenerateRequest(model=info.name, max_tokens=12)
    request.sampling.temperature = 0.0
    request.tokens.ids.extend(range(10, 40))
    async with channel(info.head_address, caller, "worker", info.head_node.removeprefix("worker/")) as connection:
        stub: Any = InferenceStub(connection)
        return [token.id async for event in stub.Generate(request) for token in event.delta.tokens]


async def test_a_ring_of_different_links_gives_the_tokens_of_one_stage_and_shows_its_links(world: World) -> None:
    expected = await tokens(world, await deploy(world, ["d"]))
    await world.calls.undeploy()
    info = await deploy(world, ["a", "b", "c", "d"], transport="auto")
    assert len(expected) == 12 and await tokens(world, info) == expected
    status = shown(await world.calls.status())
    links = [stage.link for stage in status.stages]
    assert [(link.transport, link.encryption, link.to_stage) for link in links if link] == [
        ("pigeon", "host", 1),
        ("pigeon", "host", 2),
        ("zmq", "curve", 3),
        ("zmq", "curve", 0),
    ]
    first = links[0]
    assert first is not None and first.frames > 12 and first.bytes > 12 * 128 * 4
    plain = "plain failed: a: the transport 'plain' has no encryption: worker a takes it only if it was started with"
    assert first.fallback.startswith("lame failed: RuntimeError: it cannot fly; " + plain)
    assert not any(link.fallback for link in links[1:] if link)


async def test_a_broken_ring_is_mended_over_the_links_that_it_has(here: tuple[World, Workers]) -> None:
    world, workers = here
    expected = await tokens(world, await deploy(world, ["a", "c", "d"]))
    for _ in range(2):
        for name in "acd":
            (held,) = workers[name].stages
            assert held.loaded is not None
            round = held.loaded.thread.round
            held.loaded.thread.post(Degrade("the test breaks it"))
            await until(lambda held=held, round=round: held.loaded.thread.round > round)  # type: ignore[misc]
            info = await world.calls.wait_for(pipeline_pb2.READY)
            assert [stage.link.transport for stage in info.stages] == ["pigeon", "zmq", "zmq"]
            assert await tokens(world, info) == expected


async def test_a_transport_without_encryption_is_taken_by_those_who_trust_the_fabric_and_nobody_else(
    world: World,
) -> None:
    trusted = await deploy(world, ["e", "f"])
    assert [(stage.link.transport, stage.link.encryption) for stage in trusted.stages] == [("plain", "none")] * 2
    await world.calls.undeploy()
    with pytest.raises(Unavailable, match="stage 1 on a: a: the transport 'plain' has no encryption"):
        await deploy(world, ["e", "a"], transport="plain")
    mixed = await deploy(world, ["e", "a"])
    assert [(stage.link.transport, stage.link.encryption) for stage in mixed.stages] == [("zmq", "curve")] * 2
    assert "has no encryption" in mixed.stages[0].link.fallback


@pytest.fixture
async def lame(tmp_path: Path) -> AsyncIterator[tuple[World, Workers]]:
    """Three workers, two of which have lame pigeons, and a controller that soon tries whether those are well again."""
    async with controller_here(tmp_path, better_links_s=0.2) as (made, _):
        await made.add_store()
        offers = {"a": ("lame", "zmq"), "b": ("lame", "zmq"), "c": ("zmq",)}
        workers = {name: await start_worker(made, name, offered) for name, offered in offers.items()}
        try:
            yield made, workers
        finally:
            await asyncio.gather(*(worker.node.stop() for worker in workers.values()))


async def until_links(world: World, *schemes: str) -> pipeline_pb2.PipelineInfo:
    """Until the links go by these transports and the pipeline works."""
    async with asyncio.timeout(15):
        while True:
            info = await world.calls.status()
            if info.state == pipeline_pb2.READY and tuple(stage.link.transport for stage in info.stages) == schemes:
                return info
            await asyncio.sleep(0.02)


async def test_a_link_goes_by_the_better_transport_once_that_is_well_and_no_stream_is_lost(
    lame: tuple[World, Workers],
) -> None:
    world, _ = lame
    info = await deploy(world, ["a", "b", "c"])
    assert info.stages[0].link.fallback == "lame failed: RuntimeError: it cannot fly"
    expected = await tokens(world, info)
    ended = asyncio.Event()

    async def ask() -> list[list[int]]:
        """Requests with longer and longer pauses: a trial takes one that is long enough, and the next may meet it."""
        answers = []
        while not ended.is_set():
            answers.append(await tokens(world, info))
            await asyncio.sleep(0.02 * len(answers))
        return answers

    asking = asyncio.create_task(ask())
    load("lame").well = True  # type: ignore[attr-defined]
    better = await until_links(world, "lame", "zmq", "zmq")
    ended.set()
    answers = await asking
    assert answers and all(answer == expected for answer in answers)
    assert (better.epoch, better.stages[0].link.fallback) == (info.epoch, "")
    assert await tokens(world, info) == expected


@pytest.mark.parametrize("victim", ["b", "c"])
async def test_a_ring_of_which_a_stage_does_not_follow_is_mended(
    victim: str, lame: tuple[World, Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, workers = lame
    info = await deploy(world, ["a", "b", "c"])
    expected = await tokens(world, info)
    stages = workers[victim].stages
    connect, refused = stages.connect, asyncio.Event()

    async def refuse(request: stage_pb2.ConnectRequest) -> bool:
        if request.phase == stage_pb2.SWITCH and not refused.is_set():
            refused.set()
            raise NotReady("the test is against it")
        return await connect(request)

    monkeypatch.setattr(stages, "connect", refuse)
    load("lame").well = True  # type: ignore[attr-defined]
    await asyncio.wait_for(refused.wait(), 10)
    await until_links(world, "lame", "zmq", "zmq")
    async with asyncio.timeout(10):
        while True:
            try:
                assert await tokens(world, info) == expected
                break
            except grpc.aio.AioRpcError:  # it came while the ring was being connected anew
                await asyncio.sleep(0.05)
