"""Keeps the table of pipelines equal to what the controller knows."""

import asyncio
from collections.abc import Callable

import grpc

from eldric.follower import ControllerFollower
from eldric.node import Node
from eldric.router.pipelines import Pipelines
from eldric.v1 import pipeline_pb2, pipeline_pb2_grpc

#: How often the whole list is asked for: the load of heads, and whatever a lost event may have said. Seconds.
LIST_INTERVAL_S = 2.0
LIST_TIMEOUT_S = 5.0


class PipelineWatcher:
    """Follows Pipeline.Watch of one controller at a time, and lists all pipelines now and then.

    While no controller answers, the pipelines that are known go on being served.
    """

    def __init__(self, node: Node, pipelines: Pipelines, changed: Callable[[pipeline_pb2.PipelineInfo], None]) -> None:
        """`changed` is told of each pipeline that is new or has changed."""
        self._pipelines = pipelines
        self._changed = changed
        follower = ControllerFollower(node, "pipelines", self._session)
        self.start, self.stop = follower.start, follower.stop

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
