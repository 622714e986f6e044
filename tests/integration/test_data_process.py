"""A data worker as a process: it joins, ends, and is killed."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eldric import PROTOCOL
from eldric.channels import call_errors, channel
from eldric.config import NodeConfig
from eldric.data.main import DataWorker
from eldric.data.store import ModelStore
from eldric.errors import EldricError
from eldric.node import Node
from eldric.security import Authority
from eldric.v1 import heartbeat_pb2, heartbeat_pb2_grpc, registry_pb2, registry_pb2_grpc
from eldric.v1 import model_store_pb2 as pb
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import data_config, store_calls, until


@pytest.fixture
def authority() -> Authority:
    return Authority.create("test")


class FakeController(registry_pb2_grpc.RegistryServicer, heartbeat_pb2_grpc.HeartbeatServicer):
    """Notes who registers, and answers beats."""

    def __init__(self) -> None:
        self.registered: asyncio.Queue[registry_pb2.Node] = asyncio.Queue()
        self.deregistered: asyncio.Queue[str] = asyncio.Queue()

    async def Register(self, request: registry_pb2.RegisterRequest, context: Any) -> registry_pb2.RegisterResponse:
        self.registered.put_nowait(request.node)
        return registry_pb2.RegisterResponse(beat_interval_ms=100, lease_ms=300, protocol=PROTOCOL)

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: Any
    ) -> registry_pb2.DeregisterResponse:
        self.deregistered.put_nowait(request.node_id)
        return registry_pb2.DeregisterResponse()

    async def List(self, request: Any, context: Any) -> registry_pb2.ListNodesResponse:
        return registry_pb2.ListNodesResponse()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[registry_pb2.NodeEvent]:
        return
        yield

    async def Beat(
        self, requests: AsyncIterator[heartbeat_pb2.BeatRequest], context: Any
    ) -> AsyncIterator[heartbeat_pb2.BeatResponse]:
        async for beat in requests:
            yield heartbeat_pb2.BeatResponse(sequence=beat.sequence)


@contextlib.asynccontextmanager
async def controller(folder: Path, authority: Authority) -> AsyncIterator[tuple[FakeController, str]]:
    """A node that takes registrations, and its address."""
    config = NodeConfig("controller", "c", folder, http_port=0, grpc_port=0, join_port=0, drain_s=1.0)
    node, fake = Node(config, authority.issue_identity("controller", "c")), FakeController()
    node.service(
        fake,
        registry_pb2_grpc.add_RegistryServicer_to_server,
        registry_pb2.DESCRIPTOR.services_by_name["Registry"],
    )
    node.service(
        fake,
        heartbeat_pb2_grpc.add_HeartbeatServicer_to_server,
        heartbeat_pb2.DESCRIPTOR.services_by_name["Heartbeat"],
    )
    await node.start()
    yield fake, node.grpc_address
    await node.stop()


async def test_it_registers_and_deregisters(tmp_path: Path, authority: Authority) -> None:
    async with controller(tmp_path / "controller", authority) as (fake, address), asyncio.timeout(10):
        worker = DataWorker(data_config(tmp_path, address), authority.issue_identity("data", "store"))
        await worker.node.start()
        node = await fake.registered.get()
        assert (node.id, node.kind) == ("data/store", registry_pb2.DATA)
        assert node.grpc_address == worker.node.grpc_address
        await worker.member.registered.wait()
        await worker.node.stop()
        assert await fake.deregistered.get() == "data/store"


_PROCESS = """
import asyncio, sys
from pathlib import Path
from eldric.data.main import run
from tests.stores import data_config
asyncio.run(run(data_config(Path(sys.argv[1]))))
"""


@contextlib.asynccontextmanager
async def data_process(
    folder: Path, authority: Authority, **environment: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A data worker in a process of its own, and its gRPC address."""
    authority.issue_identity("data", "store").save(folder / "node")
    file = folder / "node" / "node.json"
    file.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROCESS,
        str(folder),
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        await until(file.exists)
        yield process, json.loads(file.read_text())["grpc_address"]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["linked", "copied"])
async def test_a_worker_that_is_killed_during_an_import_comes_back_clean(
    tmp_path: Path, authority: Authority, elsewhere: bool
) -> None:
    source = tmp_path / "source"
    if elsewhere:
        shared = Path("/dev/shm")
        if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system")
        source = shared / f"eldric-test-{os.getpid()}"
    source.mkdir()
    operator = authority.issue_identity("client", "tester")
    try:
        path = write_small_llama(source / "big.gguf", SmallLlama())
        os.truncate(path, 1 << 31)
        async with (
            data_process(tmp_path, authority) as (process, address),
            channel(address, operator, "data") as connection,
        ):
            events = aiter(store_calls(connection).Import(pb.ImportRequest(path=str(path), mode="move")))
            assert (await anext(events)).phase == ("copying" if elsewhere else "hashing")
            process.send_signal(signal.SIGKILL)
            await process.wait()
        incoming = tmp_path / "models" / ".eldric" / "incoming"
        assert list(incoming.iterdir())
        assert not ModelStore(tmp_path / "models").list()
        assert path.exists()
        async with (
            data_process(tmp_path, authority) as (process, address),
            channel(address, operator, "data") as connection,
        ):
            assert not list(incoming.iterdir())
            calls = store_calls(connection)
            assert not (await calls.List(pb.ListModelsRequest())).models
            call = calls.Import(pb.ImportRequest(path=str(storyteller()), id="big"))
            assert [event async for event in call][-1].model.id == "big"
    finally:
        shutil.rmtree(source, ignore_errors=True)


async def test_a_node_that_ends_abandons_a_long_import_cleanly(tmp_path: Path, authority: Authority) -> None:
    path = write_small_llama(tmp_path / "big.gguf", SmallLlama())
    os.truncate(path, 1 << 40)
    worker = DataWorker(data_config(tmp_path), authority.issue_identity("data", "store"))
    await worker.node.start()
    operator = authority.issue_identity("client", "tester")
    async with channel(worker.node.grpc_address, operator, "data") as connection:
        call = store_calls(connection).Import(pb.ImportRequest(path=str(path)))
        await anext(aiter(call))
        stopping = asyncio.create_task(worker.node.stop())
        with pytest.raises(EldricError), call_errors():
            async for _ in call:
                pass
        await stopping
    assert not list((worker.store.folder / ".eldric" / "incoming").iterdir())
