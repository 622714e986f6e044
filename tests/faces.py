"""A node's HTTP application with two services, called without a server."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from eldric.config import NodeConfig
from eldric.errors import NotFound, NotReady
from eldric.grpc_server import Service
from eldric.interceptors import CallGuard
from eldric.metrics import CallMetrics
from eldric.readiness import Readiness
from eldric.security import Caller, caller_of
from eldric.v1 import common_pb2, model_store_pb2, model_store_pb2_grpc, pipeline_pb2, pipeline_pb2_grpc
from eldric.web_app import make_app

PIPELINE = pipeline_pb2.DESCRIPTOR.services_by_name["Pipeline"]
STORE = model_store_pb2.DESCRIPTOR.services_by_name["ModelStore"]
ADMIN = Caller("client", "admin")


class Pipelines(pipeline_pb2_grpc.PipelineServicer):
    """Servicer of which some methods are called. Answers with what it was asked; `model` says how a deploy goes."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.requests: list[Any] = []
        self.error: BaseException | None = None

    async def Status(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if request.name == "abort":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is one")
        if request.name == "slow":
            await self._forever()
        stage = pipeline_pb2.PipelineStage(index=1, memory=common_pb2.MemoryUse(kv_bytes=2**40))
        return pipeline_pb2.PipelineStatusResponse(
            pipelines=[pipeline_pb2.PipelineInfo(id=caller_of(context).node_id, epoch=2**60, stages=[stage])]
        )

    async def Deploy(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if request.model == "none":
            raise NotFound("no model none")
        yield pipeline_pb2.DeployEvent(stage=pipeline_pb2.StageProgress(worker="w1"))
        if request.model == "broken":
            raise NotReady("no worker")
        if request.model == "slow":
            await self._forever()
        yield pipeline_pb2.DeployEvent(ready=pipeline_pb2.PipelineInfo(name=request.model))

    async def Undeploy(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return pipeline_pb2.UndeployResponse()

    async def _forever(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


class Store(model_store_pb2_grpc.ModelStoreServicer):
    async def List(self, request: Any, context: Any) -> Any:
        return model_store_pb2.ListModelsResponse(models=[model_store_pb2.ModelInfo(id="all")])

    async def Metadata(self, request: Any, context: Any) -> Any:
        return model_store_pb2.ModelMetadata(info=model_store_pb2.ModelInfo(id=request.id), header={"a": "b"})

    async def Remove(self, request: Any, context: Any) -> Any:
        return model_store_pb2.RemoveModelResponse()

    async def Pull(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for number in range(3):
            yield model_store_pb2.PullChunk(file=number, data=bytes(1000))


@dataclass
class Reply:
    """What an application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events: their type and data."""
        made = []
        for block in self.body.decode().split("\n\n"):
            lines = [line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")]
            if lines:
                parts = dict(lines)
                made.append((parts.get("event", "message"), json.loads(parts["data"])))
        return made


class Face:
    """A node's HTTP application, called without a server."""

    def __init__(self, tmp_path: Path, routes: tuple[Route, ...] = ()) -> None:
        self.registry = CollectorRegistry()
        self.guard = CallGuard(CallMetrics(self.registry))
        self.pipelines = Pipelines()  # type: ignore[abstract]
        store = Store()  # type: ignore[abstract]
        services = [
            Service(self.pipelines, pipeline_pb2_grpc.add_PipelineServicer_to_server, PIPELINE),
            Service(store, model_store_pb2_grpc.add_ModelStoreServicer_to_server, STORE),
        ]
        config = NodeConfig("controller", "c1", tmp_path)
        self.readiness = Readiness("controller", "c1")
        self.app = make_app(config, self.registry, self.guard, self.readiness, services, routes)

    async def ask(
        self,
        verb: str,
        target: str,
        body: Any = None,
        *,
        caller: Caller | None = ADMIN,
        headers: dict[str, str] | None = None,
        gone: asyncio.Event | None = None,
        seen: asyncio.Event | None = None,
    ) -> Reply:
        """One request. `gone`: when set, the client goes away; `seen` is set at the first byte of the answer."""
        reply, (path, _, query) = Reply(), target.partition("?")
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        parts = iter([{"type": "http.request", "body": raw, "more_body": False}])
        left = gone or asyncio.Event()

        async def receive() -> Any:
            for part in parts:
                return part
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message.get("body"):
                reply.body += message["body"]
                if seen is not None:
                    seen.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": verb,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "https",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8880),
            "state": {"caller": caller},
        }
        await self.app(scope, receive, send)
        return reply
