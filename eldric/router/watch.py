"""Keeps the table of pipelines equal to what the controller knows."""

import asyncio
import logging
import random
from collections.abc import Callable

import grpc

from eldric.channels import call_errors, channel
from eldric.errors import EldricError
from eldric.node import Node
from eldric.router.pipelines import Pipelines
from eldric.v1 import pipeline_pb2, pipeline_pb2_grpc

log = logging.getLogger(__name__)

#: How often the whole list is asked for: the load of heads, and whatever a lost event may have said. Seconds.
LIST_INTERVAL_S = 2.0
LIST_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0


class PipelineWatcher:
    """Follows Pipeline.Watch of one controller at a time, and lists all pipelines now and then.

    While no controller answers, the pipelines that are known go on being served.
    """

    def __init__(self, node: Node, pipelines: Pipelines, changed: Callable[[pipeline_pb2.PipelineInfo], None]) -> None:
        """`changed` is told of each pipeline that is new or has changed."""
        self._node = node
        self._pipelines = pipelines
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="pipelines")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        controllers = self._node.controllers
        turn, pause_s = 0, FIRST_PAUSE_S
        while True:
            address = controllers[turn % len(controllers)]
            began = asyncio.get_running_loop().time()
            try:
                # A connection of its own each time: a kept one would not try again for as long as it has failed.
                async with channel(address, self._node.identity, "controller") as connection:
                    with call_errors(f"controller at {address}"):
                        await self._session(connection)
            except EldricError as error:
                log.warning("event=watch_lost controller=%s error=%r", address, error.message)
            except Exception:
                log.exception("event=watch_failed controller=%s", address)
            if asyncio.get_running_loop().time() - began > MAX_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            turn += 1
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def _session(self, connection: grpc.aio.Channel) -> None:
        """Returns or raises when the controller is lost."""
        stub = pipeline_pb2_grpc.PipelineStub(connection)
        tasks = [asyncio.create_task(self._watch(stub)), asyncio.create_task(self._list(stub))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, stub: "pipeline_pb2_grpc.PipelineAsyncStub") -> None:
        async for event in stub.Watch(pipeline_pb2.WatchPipelinesRequest()):
            if event.removed:
                self._pipelines.remove(event.pipeline.id)
            else:
                self._pipelines.update(event.pipeline)
                self._changed(event.pipeline)

    async def _list(self, stub: "pipeline_pb2_grpc.PipelineAsyncStub") -> None:
        while True:
            asked = self._pipelines.begin_listing()
            answer = await stub.Status(pipeline_pb2.PipelineStatusRequest(), timeout=LIST_TIMEOUT_S)
            self._pipelines.listed(asked, answer.pipelines)
            for info in answer.pipelines:
                self._changed(info)
            await asyncio.sleep(LIST_INTERVAL_S)
