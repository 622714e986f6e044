"""The ModelStore service."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from eldric.data.convert import model_blocks, model_info, model_metadata, model_tensors, resolved_source
from eldric.data.http_client import Hangup
from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.jobs import Jobs, Work
from eldric.data.leaving import Leaving
from eldric.data.metrics import DataMetrics
from eldric.data.model import StoredModel
from eldric.data.peer import Peers
from eldric.data.puller import Puller, Resolved
from eldric.data.reader import Reader, all_ranges, header_range, layer_ranges, pieces
from eldric.data.store import ModelStore
from eldric.engine.shard import ByteRange
from eldric.errors import DataLoss, InvalidRequest
from eldric.v1 import model_store_pb2 as pb
from eldric.v1 import model_store_pb2_grpc, stage_pb2

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
#: Threads for short reads: listing, headers, pieces of files.
READERS = 8

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ModelStoreService(model_store_pb2_grpc.ModelStoreServicer):
    """Serves a store. File work runs in threads: short reads in their own, imports and checks as jobs."""

    def __init__(
        self,
        store: ModelStore,
        jobs: Jobs,
        metrics: DataMetrics,
        leaving: Leaving,
        hub: Hub,
        peers: Peers,
        ollama: Path | None,
    ) -> None:
        self._store, self._jobs, self._metrics, self._leaving = store, jobs, metrics, leaving
        self._importer = Importer(store)
        self._puller = Puller(store, self._importer, hub, peers, ollama)
        #: Where the store's folder can be mounted from now.
        self.exports: Callable[[], list[stage_pb2.NfsExport]] = list
        #: Models at the last look.
        self.model_count = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="data-read")

    async def find(self, model: str) -> StoredModel:
        """A model by name. Raises NotFound, InvalidRequest for what is no name."""
        return await self._in_thread(self._store.get, model)

    async def refresh(self) -> list[StoredModel]:
        """All models; the gauges follow. Raises NotReady when the folder cannot be read."""
        models = await self._in_thread(self._store.list)
        self._metrics.saw(models)
        self.model_count = len(models)
        return models

    def close(self) -> None:
        """Lets go of the threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def List(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        models = [model_info(model) for model in await self.refresh()]
        return pb.ListModelsResponse(models=models, free_bytes=await self._in_thread(self._store.free_bytes))

    async def Metadata(self, request: pb.ModelRequest, context: Any) -> pb.ModelMetadata:
        self._leaving.check(request.id)
        metadata = model_metadata(await self.find(request.id))
        metadata.source.exports.extend(await self._in_thread(self.exports))
        return metadata

    async def Tensors(self, request: pb.ModelRequest, context: Any) -> pb.ModelTensors:
        return model_tensors(await self.find(request.id))

    async def Blocks(self, request: pb.ModelRequest, context: Any) -> pb.ModelBlocks:
        return model_blocks(await self.find(request.id))

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullChunk]:
        model = await self.find(request.id)
        ranges = _ranges(model, request)
        total_bytes = sum(part.length for part in ranges)
        served = self._metrics.served_bytes.labels("pull")
        async with self._open(model) as files:
            for part in pieces(ranges, CHUNK_BYTES):
                data = await self._in_thread(files.read, part)
                served.inc(len(data))
                yield pb.PullChunk(file=part.file, offset=part.offset, data=data, total_bytes=total_bytes)
                total_bytes = 0  # only the first chunk has it

    async def Import(self, request: pb.ImportRequest, context: Any) -> AsyncIterator[pb.ImportEvent]:
        if bool(request.path) == bool(request.source):
            raise InvalidRequest("name a path or a source, one of them")
        phase, hangup = "", Hangup()
        resolved: deque[Resolved] = deque()
        with self._count_import(), self._jobs.start(self._import(request, resolved, hangup), hangup.end) as job:
            async for update in job.updates():
                while resolved:
                    yield pb.ImportEvent(phase=phase, resolved=resolved_source(resolved.popleft()))
                phase = update.phase
                yield pb.ImportEvent(phase=phase, done_bytes=update.done_bytes, total_bytes=update.total_bytes)
            model = await job.result()
        while resolved:
            yield pb.ImportEvent(phase=phase, resolved=resolved_source(resolved.popleft()))
        await self.refresh()
        size = model.size_bytes
        yield pb.ImportEvent(phase=phase, done_bytes=size, total_bytes=size, model=model_info(model))

    def _import(self, request: pb.ImportRequest, resolved: deque[Resolved], hangup: Hangup) -> Work[StoredModel]:
        """The work of an import, in a thread. What its source turned out to be is put into `resolved`."""
        if request.source:
            return lambda report: self._puller.run(
                request.source, request.id, request.mode, report, resolved.append, hangup
            )
        return lambda report: self._importer.run(request.path, request.id, request.mode, report)

    async def Remove(self, request: pb.RemoveModelRequest, context: Any) -> pb.RemoveModelResponse:
        await asyncio.shield(asyncio.ensure_future(self._remove(request.id, force=request.force)))
        await self.refresh()
        return pb.RemoveModelResponse()

    async def _remove(self, model: str, *, force: bool) -> None:
        """Goes on when the caller leaves: until it is gone, or stays, nobody plans with it."""
        with self._leaving.hidden(model):
            if force:
                log.warning("event=removing_by_force id=%s: its pipelines cannot be loaded again", model)
            elif await self._in_thread(self._store.find, model) is not None:
                await self._leaving.ask(model)
            await self._in_thread(self._store.remove, model)

    async def Verify(self, request: pb.ModelRequest, context: Any) -> AsyncIterator[pb.VerifyEvent]:
        total_bytes = (await self.find(request.id)).size_bytes
        work = lambda report: self._store.verify(request.id, report)  # noqa: E731
        with self._count_verification(), self._jobs.start(work) as job:
            async for update in job.updates():
                yield pb.VerifyEvent(done_bytes=update.done_bytes, total_bytes=total_bytes)
            await job.result()
        yield pb.VerifyEvent(done_bytes=total_bytes, total_bytes=total_bytes, sound=True)

    async def _in_thread(
        self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: call(*args, **kwargs))

    @contextlib.asynccontextmanager
    async def _open(self, model: StoredModel) -> AsyncIterator[Reader]:
        """The model's files, open while the block runs. Raises DataLoss."""
        opening = asyncio.get_running_loop().run_in_executor(self._readers, Reader, model)
        try:
            files = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        try:
            yield files
        finally:
            self._readers.submit(files.close)  # a cancelled read may still run

    @contextlib.contextmanager
    def _count_import(self) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "ok"
        finally:
            self._metrics.imports.labels(outcome).inc()

    @contextlib.contextmanager
    def _count_verification(self) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "sound"
        except DataLoss:
            outcome = "damaged"
            raise
        finally:
            self._metrics.verifications.labels(outcome).inc()


def _close_opened(opening: asyncio.Future[Reader]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _ranges(model: StoredModel, request: pb.PullRequest) -> tuple[ByteRange, ...]:
    if request.header and request.HasField("layers"):
        raise InvalidRequest("header and layers exclude each other: ask for one of them")
    if request.header:
        return header_range(model)
    if request.HasField("layers"):
        return layer_ranges(model, request.layers.start, request.layers.end)
    return all_ranges(model)
