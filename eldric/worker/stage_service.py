"""The Stage service: load, unload, connect and look at the stages of this worker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from eldric.errors import NotFound
from eldric.transport.errors import TransportError
from eldric.v1 import stage_pb2, stage_pb2_grpc
from eldric.worker.load_news import LoadNews
from eldric.worker.stages import StageTable


class StageService(stage_pb2_grpc.StageServicer):
    def __init__(self, stages: StageTable) -> None:
        self._stages = stages

    async def Load(self, request: stage_pb2.LoadRequest, context: object) -> AsyncIterator[stage_pb2.LoadEvent]:
        news = LoadNews()
        loading = asyncio.ensure_future(self._stages.load(request, news.tell))
        loading.add_done_callback(lambda _: news.end())
        try:
            while (event := await news.next()) is not None:
                yield stage_pb2.LoadEvent(progress=event)
            yield stage_pb2.LoadEvent(loaded=await loading)
        finally:
            await _settle(loading)

    async def Unload(self, request: stage_pb2.UnloadRequest, context: object) -> stage_pb2.UnloadResponse:
        index = request.index if request.HasField("index") else None
        unloaded = await self._stages.unload(request.pipeline_id, index, request.epoch, request.reason)
        return stage_pb2.UnloadResponse(unloaded=unloaded)

    async def Connect(self, request: stage_pb2.ConnectRequest, context: object) -> stage_pb2.ConnectResponse:
        try:
            connected = await self._stages.connect(request)
        except TransportError as error:
            return stage_pb2.ConnectResponse(problem=str(error))
        return stage_pb2.ConnectResponse(busy=not connected)

    async def OpenLinks(self, request: stage_pb2.OpenLinksRequest, context: object) -> stage_pb2.OpenLinksResponse:
        return await self._stages.open_links(request)

    async def Status(self, request: stage_pb2.StageStatusRequest, context: object) -> stage_pb2.StageStatusResponse:
        statuses = [held.status() for held in self._stages]
        wanted = [each for each in statuses if request.pipeline_id in ("", each.pipeline_id)]
        return stage_pb2.StageStatusResponse(stages=wanted)

    async def Trace(
        self, request: stage_pb2.TraceRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[stage_pb2.StepTrace]:
        if not request.pipeline_id:
            raise NotFound("name a pipeline to follow")
        head = self._stages.find_head(request.pipeline_id)
        await context.send_initial_metadata(())  # so that the caller knows that steps are followed from now on
        async for step in head.follow():
            yield step


async def _settle(loading: "asyncio.Future[stage_pb2.Loaded]") -> None:
    """A caller who left before the end undoes the load: wait until nothing of it is left."""
    if not loading.done():
        loading.cancel()
        await asyncio.wait([loading])
