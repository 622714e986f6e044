"""Operations: followed to their end, left by their caller, ended by others."""

import asyncio
import contextlib

import pytest

from eldric.controller.operation import MAX_EVENTS, Operation
from eldric.errors import NotFound, Unavailable
from eldric.v1 import pipeline_pb2


def event(index: int) -> pipeline_pb2.DeployEvent:
    return pipeline_pb2.DeployEvent(stage=pipeline_pb2.StageProgress(index=index))


async def forever(operation: Operation) -> pipeline_pb2.PipelineInfo:
    operation.emit(event(0))
    await asyncio.Event().wait()
    raise AssertionError("not reached")


def ignore() -> None:
    """Nobody cares that it is over."""


async def test_the_last_event_is_the_pipeline_that_is_ready() -> None:
    ended = []

    async def work(operation: Operation) -> pipeline_pb2.PipelineInfo:
        operation.emit(event(1))
        return pipeline_pb2.PipelineInfo(name="m")

    operation = Operation(work, lambda: ended.append(True))
    events = [each async for each in operation.follow()]
    assert (events[0].stage.index, events[-1].ready.name, ended) == (1, "m", [True])


async def test_an_error_comes_after_the_events_before_it() -> None:
    async def work(operation: Operation) -> pipeline_pb2.PipelineInfo:
        operation.emit(event(1))
        raise NotFound("no")

    follow = Operation(work, ignore).follow()
    assert (await anext(follow)).stage.index == 1
    with pytest.raises(NotFound, match="no"):
        await anext(follow)


async def test_a_follower_who_leaves_ends_it() -> None:
    operation = Operation(forever, ignore)
    async with contextlib.aclosing(operation.follow()) as follow:
        await anext(follow)
    await asyncio.wait_for(operation.ended(), 1)


async def test_one_that_others_end_tells_its_follower() -> None:
    operation = Operation(forever, ignore)
    follow = operation.follow()
    await anext(follow)
    operation.cancel()
    with pytest.raises(Unavailable, match="before the pipeline was ready"):
        await anext(follow)


async def test_a_slow_follower_misses_old_progress_and_not_the_end() -> None:
    async def work(operation: Operation) -> pipeline_pb2.PipelineInfo:
        for index in range(2 * MAX_EVENTS):
            operation.emit(event(index))
        return pipeline_pb2.PipelineInfo(name="m")

    operation = Operation(work, ignore)
    await operation.ended()
    await asyncio.sleep(0)
    events = [each async for each in operation.follow()]
    assert len(events) == MAX_EVENTS
    assert events[-2].stage.index == 2 * MAX_EVENTS - 1 and events[-1].ready.name == "m"
