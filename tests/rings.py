"""A ring of stages in one process: real engine, real sockets, no nodes around it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from eldric.config import NodeConfig
from eldric.engine.gguf import ModelFile
from eldric.engine.spec import spec_of
from eldric.v1 import common_pb2, inference_pb2, stage_pb2
from eldric.worker.config import WorkerConfig
from eldric.worker.inference_service import Answer, InferenceService, make_generation
from eldric.worker.loading import StageLoader
from eldric.worker.metrics import WorkerMetrics
from eldric.worker.stages import StageTable

PIPELINE = "p-test"


@dataclass(slots=True)
class TestRing:
    """Stages of one pipeline, each in a table of its own, as if on a worker of its own."""

    __test__ = False

    tables: list[StageTable]
    loaded: list[stage_pb2.Loaded]
    sender_keys: list[str]

    async def wire(self, links: Sequence[str], *, beside: bool = False) -> None:
        """Let each link go by a transport of its own. links: the scheme of that from each stage to the next."""
        for index, table in enumerate(self.tables):
            request = stage_pb2.OpenLinksRequest(pipeline_id=PIPELINE, index=index, epoch=1, beside=beside)
            request.receive, request.send = links[index - 1], links[index]
            answer = await table.open_links(request)
            assert not answer.receive_problem and not answer.send_problem, answer
            self.loaded[index].endpoint.CopyFrom(answer.endpoint)
            self.sender_keys[index] = answer.sender_key

    async def connect(self, round: int = 0) -> None:
        """Connect the stages, or connect them again."""
        await asyncio.gather(*(self._connect(index, round) for index in range(len(self.tables))))

    async def make_beside(self, links: Sequence[str], round: int) -> None:
        """Other links, beside those in use: see `wire`."""
        used = list(self.sender_keys)
        await self.wire(links, beside=True)
        stages = range(len(self.tables))
        await asyncio.gather(*(self._connect(index, round, stage_pb2.BESIDE, used) for index in stages))

    async def switch(self, round: int) -> bool:
        """Go over to the links beside; False: the head does not."""
        if not await self._connect(0, round, stage_pb2.SWITCH):
            return False
        stages = range(1, len(self.tables))
        return all(await asyncio.gather(*(self._connect(index, round, stage_pb2.SWITCH) for index in stages)))

    async def drop_beside(self) -> None:
        """Close what is beside the links in use."""
        for index, table in enumerate(self.tables):
            request = stage_pb2.OpenLinksRequest(pipeline_id=PIPELINE, index=index, epoch=1, beside=True)
            answer = await table.open_links(request)
            self.loaded[index].endpoint.CopyFrom(answer.endpoint)
            self.sender_keys[index] = answer.sender_key

    async def _connect(
        self,
        index: int,
        round: int,
        phase: "stage_pb2.ConnectPhase.ValueType" = stage_pb2.NOW,
        used: Sequence[str] = (),
    ) -> bool:
        count = len(self.tables)
        workers = [f"w{stage}" for stage in range(count)]
        request = stage_pb2.ConnectRequest(
            pipeline_id=PIPELINE, index=index, epoch=1, workers=workers, round=round, phase=phase
        )
        request.try_ms = 0 if phase == stage_pb2.NOW else 3000
        if count > 1:
            request.next.CopyFrom(self.loaded[(index + 1) % count].endpoint)
            request.next_index = (index + 1) % count
            request.allowed_keys.extend(keys[(index - 1) % count] for keys in (self.sender_keys, used) if keys)
        return await self.tables[index].connect(request)

    async def generate(self, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
        """Token ids, greedily unless `options` (fields of GenerateRequest) say otherwise."""
        events = [event async for event in self.events(prompt, count, **options)]
        return [token.id for event in events for token in event.delta.tokens]

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        request = inference_pb2.EmbedRequest(model=PIPELINE, tokens=inference_pb2.TokenIds(ids=prompt))
        return list((await InferenceService(self.tables[0]).Embed(request, None)).embedding)

    async def events(
        self, prompt: Sequence[int], count: int, **options: Any
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        request = inference_pb2.GenerateRequest(model=PIPELINE, max_tokens=count, **options)
        request.tokens.ids.extend(prompt)
        if "sampling" not in options:
            request.sampling.temperature = 0.0
        head = self.tables[0].find_head(PIPELINE)
        generation = make_generation(request, head)
        head.submit(generation)
        answer = Answer(generation)
        try:
            async for happenings in generation.happenings():
                for event in answer.events(happenings):
                    yield event
        finally:
            if not answer.ended:
                head.drop(generation)


@contextlib.asynccontextmanager
async def ring(path: Path, layers: Sequence[int], links: Sequence[str] = (), **options: Any) -> AsyncIterator[TestRing]:
    """layers: of each stage. links: schemes of their transports, as for `wire`. options: fields of StageOptions."""
    tables = [table_of(path.parent) for _ in layers]
    settings = common_pb2.StageOptions(**{"context": 512, "slots": 4, "threads": 1, "chunk": 64, **options})
    starts = [sum(layers[:index]) for index in range(len(layers) + 1)]
    requests = [
        stage_pb2.LoadRequest(
            pipeline_id=PIPELINE,
            name=PIPELINE,
            epoch=1,
            index=index,
            stage_count=len(layers),
            layers=common_pb2.LayerRange(start=starts[index], end=starts[index + 1]),
            source=source_of(path),
            options=settings,
        )
        for index in range(len(layers))
    ]
    try:
        loaded = [await table.load(request, lambda _: None) for table, request in zip(tables, requests, strict=True)]
        made = TestRing(tables, loaded, [each.endpoint.public_key for each in loaded])
        if links:
            await made.wire(links)
        await made.connect()
        yield made
    finally:
        await asyncio.gather(*(table.close() for table in tables))


def even(path: Path, stages: int) -> list[int]:
    """Layers of so many stages, as equal as they can be."""
    with ModelFile.open(path) as model:
        count = spec_of(model).layers
    return [count * (index + 1) // stages - count * index // stages for index in range(stages)]


def source_of(path: Path) -> stage_pb2.ModelSource:
    with ModelFile.open(path) as model:
        return stage_pb2.ModelSource(
            model=path.stem,
            files=[
                stage_pb2.ModelFile(path=part.name, size_bytes=size)
                for part, size in zip(model.paths, model.file_sizes, strict=True)
            ],
            header_sha256=bytes.fromhex(model.header_sha256()),
            folder=str(path.parent),
        )


def table_of(folder: Path, **settings: Any) -> StageTable:
    """The stages of a worker without a node around them. folder: of the models; settings: fields of WorkerConfig."""
    node = NodeConfig("worker", "test", folder, controllers=("127.0.0.1:1",))
    config = WorkerConfig(node, models_dir=folder, threads=1, **settings)
    return StageTable(config, StageLoader(config, WorkerMetrics(CollectorRegistry()), lambda: None))
