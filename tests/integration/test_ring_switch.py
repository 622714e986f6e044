"""Rings that go over to other links: made beside those in use, taken while nothing runs, at no stream's cost."""

import asyncio
from itertools import product

import psutil
import pytest

from eldric.errors import EldricError
from eldric.transport.errors import TransportError
from eldric.v1 import stage_pb2
from tests.models import storyteller
from tests.rings import PIPELINE, TestRing, even, ring

pytestmark = pytest.mark.timeout(60)

SCHEMES = ("zmq", "inproc")
PROMPT = list(range(10, 40))


def links(pipeline: TestRing) -> tuple[str, ...]:
    return tuple(stage.status().link.transport for table in pipeline.tables for stage in table)


def states(pipeline: TestRing) -> set["stage_pb2.StageState.ValueType"]:
    return {stage.state for table in pipeline.tables for stage in table}


async def test_a_ring_goes_from_any_mixture_of_links_to_any_other_and_never_breaks() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        expected = await pipeline.generate(PROMPT, 16)
        for round, wanted in enumerate([*product(SCHEMES, repeat=3), ("zmq", "zmq", "inproc"), ("zmq",) * 3], 1):
            await pipeline.make_beside(wanted, round)
            assert await pipeline.generate(PROMPT, 4) == expected[:4]  # by the links in use
            assert await pipeline.switch(round)
            assert await pipeline.generate(PROMPT, 16) == expected
            await pipeline.drop_beside()
            assert await pipeline.generate(PROMPT, 4) == expected[:4]
            assert (links(pipeline), states(pipeline)) == (wanted, {stage_pb2.SERVING})


async def test_a_head_with_sequences_does_not_switch_and_they_go_on() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        expected = await pipeline.generate(PROMPT, 200)
        running = asyncio.create_task(pipeline.generate(PROMPT, 200))
        await pipeline.make_beside(("inproc", "zmq", "inproc"), 1)
        assert not await pipeline.switch(1)
        await pipeline.drop_beside()
        assert await running == expected
        assert links(pipeline) == ("zmq",) * 3


async def test_whoever_comes_while_the_stages_go_over_one_after_the_other_is_served() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        expected = await pipeline.generate(PROMPT, 16)
        await pipeline.make_beside(("inproc", "inproc", "zmq"), 1)
        assert await pipeline._connect(0, 1, stage_pb2.SWITCH)
        coming = asyncio.create_task(pipeline.generate(PROMPT, 16))
        await asyncio.sleep(0.1)  # its frames wait at the next stage
        for index in (2, 1):
            assert await pipeline._connect(index, 1, stage_pb2.SWITCH)
            await asyncio.sleep(0.05)
        assert await coming == expected
        await pipeline.drop_beside()
        assert await pipeline.generate(PROMPT, 16) == expected


async def test_links_beside_that_reach_nobody_change_nothing_and_leave_nothing_open() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        expected = await pipeline.generate(PROMPT, 8)
        await pipeline.drop_beside()
        before = psutil.Process().num_fds()
        await pipeline.wire(("inproc", "inproc"), beside=True)
        request = stage_pb2.ConnectRequest(pipeline_id=PIPELINE, epoch=1, next_index=1, round=1, try_ms=100)
        request.phase = stage_pb2.BESIDE
        request.next.CopyFrom(pipeline.loaded[1].endpoint)  # which lets nobody in
        with pytest.raises(TransportError):
            await pipeline.tables[0].connect(request)
        await pipeline.drop_beside()
        assert psutil.Process().num_fds() <= before
        assert await pipeline.generate(PROMPT, 8) == expected


async def test_a_stage_that_is_unloaded_closes_what_is_beside() -> None:
    before = psutil.Process().num_fds()
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        await pipeline.make_beside(("inproc", "inproc"), 1)
        assert await pipeline.switch(1)  # what was in use stays open
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        await pipeline.make_beside(("inproc", "zmq"), 1)
        await pipeline.tables[1].unload(PIPELINE)
        with pytest.raises((TransportError, EldricError)):
            await pipeline._connect(1, 1, stage_pb2.SWITCH)
    assert psutil.Process().num_fds() <= before + 2  # the engine's own, once


@pytest.mark.parametrize("phase", [stage_pb2.BESIDE, stage_pb2.SWITCH])
async def test_a_stage_that_has_nothing_beside_goes_on_with_what_it_has(
    phase: "stage_pb2.ConnectPhase.ValueType",
) -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        expected = await pipeline.generate(PROMPT, 8)
        await asyncio.gather(*(pipeline._connect(index, 1, phase) for index in range(2)))
        assert await pipeline.generate(PROMPT, 8) == expected
        assert links(pipeline) == ("zmq", "zmq")
