"""Model stores and data workers for tests."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from eldric.channels import call_errors, channel
from eldric.config import NodeConfig
from eldric.data.config import DataConfig
from eldric.data.main import DataWorker
from eldric.security import Authority
from eldric.v1 import model_store_pb2 as pb
from eldric.v1.model_store_pb2_grpc import ModelStoreStub

if TYPE_CHECKING:
    import grpc

    from eldric.v1.model_store_pb2_grpc import ModelStoreAsyncStub


def ignore(phase: str, done_bytes: int, total_bytes: int) -> None:
    """A report that nobody reads."""


def damage(path: Path) -> None:
    """Change one byte of a file of a store, and not of the file that it may be a link to."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


def as_unknown_architecture(path: Path, source: Path) -> Path:
    """A copy of a Llama file that says it is of another family, which the engine does not know."""
    data = source.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba", 1)
    path.write_bytes(data.replace(b"llama.", b"mamba."))
    return path


#: The address of a controller that is not there.
NOBODY = "127.0.0.1:1"


def data_config(folder: Path, controller: str = NOBODY, name: str = "store") -> DataConfig:
    """A data worker on free ports, its store in folder/models; by default nobody is its controller."""
    node = NodeConfig("data", name, folder / "node", http_port=0, grpc_port=0, controllers=(controller,), drain_s=1.0)
    return DataConfig(node, folder / "models", jobs=1, queue=1)


def store_calls(connection: "grpc.aio.Channel") -> "ModelStoreAsyncStub":
    stub: Any = ModelStoreStub(connection)
    made: ModelStoreAsyncStub = stub
    return made


@dataclass(frozen=True, slots=True)
class Served:
    """A data worker in this process, and callers with an operator's certificate."""

    worker: DataWorker
    authority: Authority
    calls: "ModelStoreAsyncStub"
    http: httpx.AsyncClient

    @property
    def folder(self) -> Path:
        return self.worker.store.folder

    async def add(self, path: Path, model: str = "", mode: str = "") -> list[pb.ImportEvent]:
        """Import a file; all events, or the error that the service raised."""
        with call_errors():
            return [event async for event in self.calls.Import(pb.ImportRequest(path=str(path), id=model, mode=mode))]

    async def pull(self, request: pb.PullRequest) -> list[pb.PullChunk]:
        """All chunks of a pull, or the error that the service raised."""
        with call_errors():
            return [chunk async for chunk in self.calls.Pull(request)]

    def client(self, tls: ssl.SSLContext) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.worker.node.http_url, verify=tls, timeout=10)


@contextlib.asynccontextmanager
async def serving(folder: Path, authority: Authority | None = None, name: str = "store") -> AsyncIterator[Served]:
    """A data worker whose store is folder/models; of a cluster of its own, unless its authority is given."""
    authority = authority or Authority.create("test")
    worker = DataWorker(data_config(folder, name=name), authority.issue_identity("data", name))
    await worker.node.start()
    operator = authority.issue_identity("client", "tester")
    async with (
        channel(worker.node.grpc_address, operator, "data", name) as connection,
        httpx.AsyncClient(base_url=worker.node.http_url, verify=operator.client_context(), timeout=10) as http,
    ):
        yield Served(worker, authority, store_calls(connection), http)
    await worker.node.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what gives no event: files. At most 10 seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
