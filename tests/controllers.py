"""Controllers for tests, in this process or in one of their own, with workers and a model store around them.

Usage, as a process: python -m tests.controllers FOLDER HTTP_PORT
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eldric.channels import call_errors, channel
from eldric.config import NodeConfig
from eldric.controller.config import ControllerConfig
from eldric.controller.main import Controller, run
from eldric.data.config import DataConfig
from eldric.data.main import DataWorker
from eldric.node import Node
from eldric.security import Authority, Identity
from eldric.v1 import model_store_pb2, pipeline_pb2, registry_pb2
from eldric.v1.membership_pb2_grpc import MembershipStub
from eldric.v1.model_store_pb2_grpc import ModelStoreStub
from eldric.v1.pipeline_pb2_grpc import PipelineStub
from eldric.v1.registry_pb2_grpc import RegistryStub
from tests.models import storyteller
from tests.workers import GIB, FakeWorker, issue, until

if TYPE_CHECKING:
    import grpc

    from eldric.v1.membership_pb2_grpc import MembershipAsyncStub
    from eldric.v1.pipeline_pb2_grpc import PipelineAsyncStub
    from eldric.v1.registry_pb2_grpc import RegistryAsyncStub

#: The model of the store: 6 layers.
MODEL = "tale"


def controller_config(folder: Path, http_port: int = 0, **settings: Any) -> ControllerConfig:
    """A controller with short beats. Port 0: free ones. settings: further ones of ControllerConfig."""
    node = NodeConfig("controller", "main", folder, http_port=http_port, drain_s=2.0)
    return ControllerConfig(node, beat_interval_ms=200, lease_ms=1500, settle_ms=4000, **settings)


class Calls:
    """An operator's calls to a controller."""

    def __init__(self, connection: "grpc.aio.Channel") -> None:
        self.connection = connection
        stubs: tuple[Any, Any, Any] = PipelineStub(connection), RegistryStub(connection), MembershipStub(connection)
        self.pipeline: PipelineAsyncStub = stubs[0]
        self.registry: RegistryAsyncStub = stubs[1]
        self.membership: MembershipAsyncStub = stubs[2]

    async def deploy(self, stages: int = 0, name: str = "", **fields: Any) -> list[pipeline_pb2.DeployEvent]:
        """All events, or the error that stopped it."""
        request = pipeline_pb2.DeployRequest(model=MODEL, stages=stages, name=name, **fields)
        with call_errors():
            return [event async for event in self.pipeline.Deploy(request)]

    async def rebalance(self, name: str = MODEL) -> list[pipeline_pb2.DeployEvent]:
        with call_errors():
            return [event async for event in self.pipeline.Rebalance(pipeline_pb2.RebalanceRequest(name=name))]

    async def undeploy(self, name: str = MODEL) -> None:
        with call_errors():
            await self.pipeline.Undeploy(pipeline_pb2.UndeployRequest(name=name))

    async def status(self, name: str = MODEL) -> pipeline_pb2.PipelineInfo:
        with call_errors():
            answer = await self.pipeline.Status(pipeline_pb2.PipelineStatusRequest(name=name))
        return answer.pipelines[0]

    async def nodes(self, kind: "registry_pb2.NodeKind.ValueType" = registry_pb2.WORKER) -> dict[str, str]:
        """State by name."""
        answer = await self.registry.List(registry_pb2.ListNodesRequest(kind=kind))
        return {node.name: registry_pb2.NodeState.Name(node.state) for node in answer.nodes}

    async def wait_for_node(self, kind: "registry_pb2.NodeKind.ValueType", name: str) -> None:
        """Returns once that node is up."""
        async with asyncio.timeout(15):
            async for event in self.registry.Watch(registry_pb2.WatchNodesRequest(kind=kind)):
                if event.node.name == name and event.node.state == registry_pb2.UP and not event.removed:
                    return

    async def wait_for(self, state: "pipeline_pb2.PipelineState.ValueType", name: str = MODEL) -> Any:
        """The pipeline's info once it is in that state."""
        async with asyncio.timeout(15):
            async for event in self.pipeline.Watch(pipeline_pb2.WatchPipelinesRequest()):
                if event.pipeline.name == name and event.pipeline.state == state and not event.removed:
                    return event.pipeline
        raise AssertionError("the controller ended the stream")


class World:
    """What surrounds a controller at `address`: workers and a store with one model; everything ends with it."""

    def __init__(self, folder: Path, authority: Authority, address: str) -> None:
        self.folder = folder
        self.authority = authority
        self.address = address
        self.workers: dict[str, FakeWorker] = {}
        self._nodes: list[Node] = []
        self._ends = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "World":
        operator = self.authority.issue_identity("client", "tester")
        connection = await self._ends.enter_async_context(channel(self.address, operator, "controller"))
        self.calls = Calls(connection)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(node.stop() for node in self._nodes))
        await self._ends.aclose()

    async def add_workers(self, *names: str, memory_bytes: int = 16 * GIB, **settings: Any) -> None:
        """settings: further arguments of FakeWorker."""
        for name in names:
            folder = issue(self.authority, self.folder, "worker", name)
            worker = FakeWorker(folder, self.address, name, memory_bytes=memory_bytes, **settings)
            self.workers[name] = worker
            self._nodes.append(worker.node)
        await asyncio.gather(*(self.workers[name].start() for name in names))

    async def add_empty_store(self, name: str = "store") -> DataWorker:
        """A data worker."""
        folder = issue(self.authority, self.folder, "data", name)
        node = NodeConfig("data", name, folder, http_port=0, grpc_port=0, controllers=(self.address,), drain_s=1.0)
        models = self.folder / ("models" if name == "store" else f"models-{name}")
        store = DataWorker(DataConfig(node, models), Identity.load(folder))
        await store.node.start()
        self._nodes.append(store.node)
        await store.member.registered.wait()
        return store

    async def add_store(self, name: str = "store", path: Path | None = None) -> DataWorker:
        """A data worker that has MODEL, which is the storyteller or another file."""
        store = await self.add_empty_store(name)
        operator = self.authority.issue_identity("client", "tester")
        async with channel(store.node.grpc_address, operator, "data") as connection:
            stub: Any = ModelStoreStub(connection)
            request = model_store_pb2.ImportRequest(path=str(path or storyteller()), id=MODEL)
            async for _ in stub.Import(request):
                pass
        return store

    def stages(self) -> list[tuple[str, int, int]]:
        """Worker, epoch and index of every stage that a worker holds now."""
        return sorted(
            (name, epoch, index) for name, worker in self.workers.items() for _, epoch, index in worker.stages
        )


@contextlib.asynccontextmanager
async def controller_here(folder: Path, **settings: Any) -> AsyncIterator[tuple[World, Controller]]:
    """A controller in this process; settings of its configuration. Opened again in its folder it knows what it knew."""
    home = folder / "main"
    if (home / "authority").exists():
        authority = Authority.load(home / "authority")
    else:
        authority = Authority.create("test")
        home = issue(authority, folder, "controller", "main")
        authority.save(home / "authority")
    controller = await Controller.open(controller_config(home, **settings), Identity.load(home))
    await controller.node.start()
    try:
        async with World(folder, authority, controller.node.grpc_address) as world:
            yield world, controller
    finally:
        await controller.node.stop()


class ControllerProcess:
    """A controller in a process of its own, which can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create("test")
        self.home = issue(self.authority, folder, "controller", "main")
        self.authority.save(self.home / "authority")
        self._http_port = _free_ports()
        self.address = f"127.0.0.1:{self._http_port + 1000}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        arguments = "-m", "tests.controllers", str(self.home), str(self._http_port)
        self._process = await asyncio.create_subprocess_exec(sys.executable, *arguments, start_new_session=True)
        await until(lambda: (self.home / "node.json").exists())

    async def kill(self) -> None:
        """As kill -9 does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            (self.home / "node.json").unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def controller_elsewhere(folder: Path) -> AsyncIterator[tuple[World, ControllerProcess]]:
    """A controller in a process of its own."""
    process = ControllerProcess(folder)
    await process.start()
    try:
        async with World(folder, process.authority, process.address) as world:
            yield world, process
    finally:
        await process.kill()


def _free_ports() -> int:
    """An HTTP port whose gRPC and join ports are free as well."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 60000 and all(_is_free(port + offset) for offset in (1000, 2000)):
            return port
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


if __name__ == "__main__":
    asyncio.run(run(controller_config(Path(sys.argv[1]), int(sys.argv[2]))))
