"""A router's surroundings without a model: a controller, a head that says what a test wants, and a data worker.

They are real nodes with real certificates and sockets in the test's own event loop; only what they answer is made up.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from google.protobuf.descriptor import FileDescriptor

from eldric import PROTOCOL
from eldric.config import NodeConfig
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from eldric.errors import NotFound
from eldric.node import Node
from eldric.router.config import RouterConfig
from eldric.router.main import Router
from eldric.security import Authority
from eldric.v1 import (
    heartbeat_pb2,
    heartbeat_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_store_pb2,
    model_store_pb2_grpc,
    pipeline_pb2,
    pipeline_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    stage_pb2,
)
from tests.models import storyteller

HELLO: list[Any] = [{"role": "user", "content": "Tell me a story."}]
STORY = "Once upon a time there was a little dog."

Say = Callable[[inference_pb2.GenerateRequest], AsyncIterator[inference_pb2.Delta]]


class FakeRegistry(registry_pb2_grpc.RegistryServicer, heartbeat_pb2_grpc.HeartbeatServicer):
    """Takes every node, and lists those that a test put in."""

    def __init__(self) -> None:
        self.nodes: dict[str, registry_pb2.Node] = {}

    async def Register(self, request: registry_pb2.RegisterRequest, context: Any) -> registry_pb2.RegisterResponse:
        self.nodes[request.node.id] = request.node
        self.nodes[request.node.id].state = registry_pb2.UP
        return registry_pb2.RegisterResponse(beat_interval_ms=1000, lease_ms=3000, protocol=PROTOCOL)

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: Any
    ) -> registry_pb2.DeregisterResponse:
        self.nodes.pop(request.node_id, None)
        return registry_pb2.DeregisterResponse()

    async def List(self, request: registry_pb2.ListNodesRequest, context: Any) -> registry_pb2.ListNodesResponse:
        nodes = [node for node in self.nodes.values() if request.kind in (0, node.kind)]
        return registry_pb2.ListNodesResponse(nodes=nodes)

    async def Beat(
        self, requests: AsyncIterator[heartbeat_pb2.BeatRequest], context: Any
    ) -> AsyncIterator[heartbeat_pb2.BeatResponse]:
        async for request in requests:
            yield heartbeat_pb2.BeatResponse(sequence=request.sequence)


class FakePipelines(pipeline_pb2_grpc.PipelineServicer):
    """The pipelines that a test put in; `put` and `drop` tell those who watch."""

    def __init__(self) -> None:
        self.infos: dict[str, pipeline_pb2.PipelineInfo] = {}
        self._watchers: set[asyncio.Queue[pipeline_pb2.PipelineEvent]] = set()

    def put(self, info: pipeline_pb2.PipelineInfo) -> None:
        self.infos[info.id] = info
        self._tell(pipeline_pb2.PipelineEvent(pipeline=info))

    def drop(self, pipeline_id: str) -> None:
        self._tell(pipeline_pb2.PipelineEvent(pipeline=self.infos.pop(pipeline_id), removed=True))

    def _tell(self, event: pipeline_pb2.PipelineEvent) -> None:
        for queue in self._watchers:
            queue.put_nowait(event)

    async def Status(
        self, request: pipeline_pb2.PipelineStatusRequest, context: Any
    ) -> pipeline_pb2.PipelineStatusResponse:
        return pipeline_pb2.PipelineStatusResponse(pipelines=self.infos.values())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pipeline_pb2.PipelineEvent]:
        queue: asyncio.Queue[pipeline_pb2.PipelineEvent] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for info in list(self.infos.values()):
                yield pipeline_pb2.PipelineEvent(pipeline=info)
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


class FakeHead(inference_pb2_grpc.InferenceServicer):
    """Answers every prompt with `say`'s tokens. Keeps the requests and counts what runs."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.error: Exception | None = None
        self.reason = inference_pb2.LENGTH
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.running = 0
        self.cancelled = asyncio.Event()
        self.cancels: list[str] = []

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        self.running += 1
        count = 0
        try:
            prompt = len(request.tokens.ids)
            yield inference_pb2.GenerateEvent(
                started=inference_pb2.Started(request_id=request.request_id, prompt_tokens=prompt)
            )
            async for delta in self.say(request):
                count += len(delta.tokens)
                yield inference_pb2.GenerateEvent(delta=delta)
            usage = inference_pb2.Usage(prompt_tokens=prompt, completion_tokens=count)
            timings = inference_pb2.Timings(queue_ms=1, prompt_ms=2, generation_ms=3)
            yield inference_pb2.GenerateEvent(
                finished=inference_pb2.Finished(reason=self.reason, usage=usage, timings=timings)
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> inference_pb2.EmbedResponse:
        """A vector, once `say` has come to its end."""
        generate = inference_pb2.GenerateRequest(tokens=request.tokens, max_tokens=1)
        async with contextlib.aclosing(self.Generate(generate, context)) as events:  # type: ignore[type-var]
            async for _ in events:
                pass
        return inference_pb2.EmbedResponse(embedding=[1.0, 0.0], prompt_tokens=len(request.tokens.ids))

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Any) -> inference_pb2.CancelResponse:
        self.cancels.append(request.request_id)
        return inference_pb2.CancelResponse(cancelled=True)


class FakeStore(model_store_pb2_grpc.ModelStoreServicer):
    """Serves the header of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pulls = 0

    async def Pull(
        self, request: model_store_pb2.PullRequest, context: Any
    ) -> AsyncIterator[model_store_pb2.PullChunk]:
        self.pulls += 1
        if request.id != self.path.stem or not request.header:
            raise NotFound(f"no model {request.id}")
        with ModelFile.open(self.path) as model:
            header = self.path.read_bytes()[: model.header_bytes]
        for begin in range(0, len(header), 10_000):
            chunk = header[begin : begin + 10_000]
            yield model_store_pb2.PullChunk(offset=begin, data=chunk, total_bytes=len(header))


def speak(tokens: Iterable[int]) -> Say:
    """One token in each delta, with made-up logprobs when the request asks for some."""
    chosen = list(tokens)

    async def say(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        for number, token in enumerate(chosen[: request.max_tokens or None]):
            sampled = inference_pb2.GeneratedToken(id=token)
            if request.sampling.HasField("logprobs"):
                sampled.logprob = -0.5 - number
                for rank in range(request.sampling.logprobs):
                    sampled.top.add(token=(token + rank) % 839, logprob=-0.5 - number - rank)
            yield inference_pb2.Delta(tokens=[sampled])

    return say


@dataclass(slots=True)
class FakeCluster:
    """A running router with its surroundings."""

    folder: Path
    authority: Authority
    tokenizer: Tokenizer
    registry: FakeRegistry
    pipelines: FakePipelines
    controller_node: Node
    heads: dict[str, FakeHead]
    head_nodes: dict[str, Node]
    router: Router
    store: FakeStore | None = None

    @property
    def url(self) -> str:
        return self.router.node.http_url

    @property
    def head(self) -> FakeHead:
        return next(iter(self.heads.values()))

    def words(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer.encode(text, special=True, add_bos=False)

    def info(self, name: str = "storyteller", head: str = "w1", **fields: Any) -> pipeline_pb2.PipelineInfo:
        """A ready pipeline at one of the heads, of the storyteller model."""
        path = storyteller()
        with ModelFile.open(path) as model:
            digest = bytes.fromhex(model.header_sha256())
        visible = "" if self.store else str(path.parent)
        made = pipeline_pb2.PipelineInfo(
            id=f"id-{name}",
            name=name,
            model="storyteller",
            state=pipeline_pb2.READY,
            head_address=self.head_nodes[head].grpc_address,
            head_node=f"worker/{head}",
            source=stage_pb2.ModelSource(
                model=path.stem,
                files=[stage_pb2.ModelFile(path=path.name, size_bytes=path.stat().st_size)],
                header_sha256=digest,
                folder=visible,
            ),
        )
        made.options.context = 128
        made.created_at.seconds = 1_700_000_000
        for key, value in fields.items():
            setattr(made, key, value)
        return made

    async def put(self, info: pipeline_pb2.PipelineInfo) -> None:
        """Announces a pipeline and waits until the router knows it."""
        self.pipelines.put(info)
        async with asyncio.timeout(5):
            while info not in self.router.pipelines.infos():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def fake_cluster(
    folder: Path,
    *,
    heads: Iterable[str] = ("w1",),
    store: bool = False,
    deployed: bool = True,
    **settings: Any,
) -> AsyncIterator[FakeCluster]:
    """A router that knows the storyteller as deployed at the first head, which says "Once upon a time.".

    store: the model file is only at the data worker. settings: of the router.
    """
    authority = Authority.create("test")
    with ModelFile.open(storyteller()) as model:
        tokenizer = Tokenizer.from_metadata(model.metadata)
    registry, pipelines = FakeRegistry(), FakePipelines()  # type: ignore[abstract]
    controller = _controller(folder, authority, registry, pipelines)
    async with _running(controller):
        known = (controller.grpc_address,)
        words = tokenizer.encode("Once upon a time.", special=True, add_bos=False)
        fakes = {name: FakeHead(speak(words)) for name in heads}  # type: ignore[abstract]
        nodes = {name: _node(folder, authority, "worker", name, known) for name in fakes}
        for name, fake in fakes.items():
            _serve(nodes[name], fake, inference_pb2_grpc.add_InferenceServicer_to_server, inference_pb2.DESCRIPTOR)
        config = _config(folder, "router", "r1", known)
        authority.issue_identity("router", "r1").save(config.folder)
        router = Router(RouterConfig(config, **settings))
        cluster = FakeCluster(folder, authority, tokenizer, registry, pipelines, controller, fakes, nodes, router)
        others = list(nodes.values())
        if store:
            cluster.store = FakeStore(storyteller())  # type: ignore[abstract]
            others.append(_node(folder, authority, "data", "d1", known))
            adder = model_store_pb2_grpc.add_ModelStoreServicer_to_server
            _serve(others[-1], cluster.store, adder, model_store_pb2.DESCRIPTOR)
        async with _running(*others), _running(router.node):
            if store:
                address = others[-1].grpc_address
                registry.nodes["data/d1"] = registry_pb2.Node(
                    id="data/d1", name="d1", kind=registry_pb2.DATA, state=registry_pb2.UP, grpc_address=address
                )
            if deployed:
                await cluster.put(cluster.info(head=next(iter(fakes))))
            yield cluster


def _controller(folder: Path, authority: Authority, registry: FakeRegistry, pipelines: FakePipelines) -> Node:
    node = _node(folder, authority, "controller", "c1", ())
    _serve(node, registry, registry_pb2_grpc.add_RegistryServicer_to_server, registry_pb2.DESCRIPTOR)
    _serve(node, registry, heartbeat_pb2_grpc.add_HeartbeatServicer_to_server, heartbeat_pb2.DESCRIPTOR)
    _serve(node, pipelines, pipeline_pb2_grpc.add_PipelineServicer_to_server, pipeline_pb2.DESCRIPTOR)
    return node


def _config(folder: Path, kind: str, name: str, controllers: tuple[str, ...]) -> NodeConfig:
    return NodeConfig(kind, name, folder / f"{kind}-{name}", http_port=0, grpc_port=0, controllers=controllers)


def _node(folder: Path, authority: Authority, kind: str, name: str, controllers: tuple[str, ...]) -> Node:
    return Node(_config(folder, kind, name, controllers), authority.issue_identity(kind, name))


def _serve(node: Node, servicer: Any, adder: Callable[[Any, Any], None], file: FileDescriptor) -> None:
    (service,) = file.services_by_name.values()
    node.service(servicer, adder, service)


@contextlib.asynccontextmanager
async def _running(*nodes: Node) -> AsyncIterator[None]:
    try:
        await asyncio.gather(*(node.start() for node in nodes))
        yield
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))


@contextlib.asynccontextmanager
async def client_of(cluster: FakeCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client."""
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=10) as made:
        yield made


@contextlib.asynccontextmanager
async def http_of(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to the router."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=10) as made:
        yield made


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def silent(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
    """For `FakeHead.say`: takes a request and never says a word."""
    await asyncio.Event().wait()
    yield inference_pb2.Delta()
