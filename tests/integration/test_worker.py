"""A worker with a real engine: loads that end early, requests that cannot be, and its faces over mutual TLS."""

import asyncio
import contextlib
import json
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from eldric import PROTOCOL, node_file
from eldric.channels import call_errors, channel
from eldric.config import NodeConfig
from eldric.engine.errors import InvalidSampling, LoadCancelled
from eldric.errors import AlreadyExists, InvalidRequest, NotEnoughMemory, NotFound, PermissionDenied
from eldric.node import Node
from eldric.security import Authority
from eldric.v1 import (
    common_pb2,
    heartbeat_pb2,
    heartbeat_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
)
from tests.fake_cluster import FakeRegistry
from tests.models import smollm2, storyteller
from tests.newer import newer
from tests.rings import PIPELINE, even, ring, source_of, table_of

pytestmark = pytest.mark.timeout(60)


def load_request(path: Path, **fields: Any) -> stage_pb2.LoadRequest:
    """A stage of the storyteller that is a pipeline of its own."""
    made: dict[str, Any] = {"pipeline_id": "p1", "name": "tale", "epoch": 1, "index": 0, "stage_count": 1}
    options = common_pb2.StageOptions(context=256, slots=2, threads=1)
    layers = common_pb2.LayerRange(end=6)
    return stage_pb2.LoadRequest(**{**made, "source": source_of(path), "options": options, "layers": layers, **fields})


def mapped(path: Path) -> bool:
    """Whether this process maps the file."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.model
async def test_a_load_that_is_cancelled_midway_leaves_no_page_mapped() -> None:
    path = smollm2()
    table = table_of(path.parent)
    loading: asyncio.Task[stage_pb2.Loaded] | None = None
    seen: list[tuple[int, int]] = []

    def cancel(progress: stage_pb2.LoadProgress) -> None:
        seen.append((progress.done_bytes, progress.total_bytes))
        assert loading is not None
        loading.cancel()

    request = load_request(path, layers=common_pb2.LayerRange(end=30))
    loading = asyncio.create_task(table.load(request, cancel))
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert seen and seen[0][0] < seen[0][1], "it was cancelled before its end"
    async with asyncio.timeout(5):  # it was cancelled more than once, so it did not wait for its own end
        while len(table):
            await asyncio.sleep(0.01)
    assert not len(table) and table.memory_used_bytes == 0 and not mapped(path)


@pytest.mark.model
async def test_unloading_a_stage_that_loads_ends_the_load() -> None:
    path = smollm2()
    table = table_of(path.parent)
    begun = asyncio.Event()
    request = load_request(path, layers=common_pb2.LayerRange(end=30))
    loading = asyncio.create_task(table.load(request, lambda progress: begun.set()))
    await begun.wait()
    assert await table.unload("p1") == 1
    assert not len(table) and not mapped(path)
    with pytest.raises(LoadCancelled):
        await loading


async def test_a_plan_that_does_not_fit_names_the_bytes() -> None:
    path = storyteller()
    table = table_of(path.parent, memory_bytes=3 << 20)
    with pytest.raises(NotEnoughMemory, match=rf"needs \d+ bytes, and worker test has {3 << 20} free"):
        await table.load(load_request(path), lambda progress: None)
    assert not len(table) and not mapped(path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": common_pb2.LayerRange(end=7)}, "of a model that has 6"),
        ({"layers": common_pb2.LayerRange(end=3)}, "not those of stage 0 of 1"),
        ({"layers": common_pb2.LayerRange(start=2, end=6), "stage_count": 2}, "not those of stage 0 of 2"),
        ({"options": common_pb2.StageOptions(weights="squeezed")}, "weights is 'squeezed'; it can be auto, mapped"),
        ({"options": common_pb2.StageOptions(kv_type="q1")}, "kv_type is 'q1'; it can be f16, f32"),
        ({"options": common_pb2.StageOptions(context=8192, chunk=5000)}, "a chunk of 5000 tokens; at most 4096"),
    ],
)
async def test_a_request_that_cannot_be_a_stage_is_refused(fields: dict[str, Any], words: str) -> None:
    table = table_of(storyteller().parent)
    with pytest.raises(InvalidRequest, match=words):
        await table.load(load_request(storyteller(), **fields), lambda progress: None)
    assert not len(table) and not mapped(storyteller())


async def test_a_sampling_that_the_tail_could_not_follow_is_refused_at_the_head() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        expected = await pipeline.generate([5, 6, 7], 4)
        for bias in ({839: 1.0}, {-1: 1.0}, {3: 1e9}):
            with pytest.raises(InvalidSampling, match="logit_bias"):
                await pipeline.generate([5, 6, 7], 4, sampling={"logit_bias": bias})
        assert await pipeline.generate([5, 6, 7], 4) == expected


async def test_unloading_the_head_ends_those_who_follow_its_steps() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        head = pipeline.tables[0].find_head(PIPELINE)

        async def follow() -> int:
            return len([step async for step in head.follow()])

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        await pipeline.generate([5, 6, 7], 8)
        await pipeline.tables[0].unload(PIPELINE)
        assert await asyncio.wait_for(following, 5) >= 8


async def test_a_connect_whose_caller_leaves_does_not_break_the_stage() -> None:
    """The next stage does not listen, so connecting takes as long as it may; the caller gives up before."""
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        (held,) = pipeline.tables[0]
        nowhere = stage_pb2.ConnectRequest(pipeline_id=PIPELINE, epoch=1, next_index=1)
        nowhere.next.CopyFrom(pipeline.loaded[1].endpoint)
        nowhere.next.address = "zmq://127.0.0.1:1"
        connecting = asyncio.create_task(pipeline.tables[0].connect(nowhere))
        await asyncio.sleep(0.1)
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await connecting
        async with asyncio.timeout(3):  # a command that waits ends the attempt
            await pipeline.tables[0].unload(PIPELINE)
        assert held.loaded is not None and "cannot reach the next stage" in held.loaded.thread.message


# A worker's own process.


class Controller(FakeRegistry):
    """Takes the worker, and wants the stages that a test put in."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[heartbeat_pb2.WantedStage] = []
        self.beats: list[heartbeat_pb2.BeatRequest] = []

    async def Register(self, request: registry_pb2.RegisterRequest, context: Any) -> registry_pb2.RegisterResponse:
        await super().Register(request, context)
        return registry_pb2.RegisterResponse(beat_interval_ms=100, lease_ms=2000, protocol=PROTOCOL)

    async def Beat(
        self, requests: AsyncIterator[heartbeat_pb2.BeatRequest], context: Any
    ) -> AsyncIterator[heartbeat_pb2.BeatResponse]:
        async for request in requests:
            self.beats.append(request)
            yield heartbeat_pb2.BeatResponse(sequence=request.sequence, wanted=self.wanted)


@dataclass(slots=True)
class WorkerProcess:
    folder: Path
    authority: Authority
    controller: Controller
    document: dict[str, Any] = field(default_factory=dict)

    def tls(self, kind: str, name: str) -> ssl.SSLContext:
        """For a caller with such a certificate."""
        folder = self.folder / f"{kind}-{name}"
        self.authority.issue_identity(kind, name).save(folder)
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "node.pem", folder / "node-key.pem")
        return context

    def http(self, kind: str = "controller") -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.document["http_url"], verify=self.tls(kind, "caller"), timeout=10.0)

    def channel(self, kind: str) -> grpc.aio.Channel:
        identity = self.authority.issue_identity(kind, "caller")
        return channel(self.document["grpc_address"], identity, "worker", "w1")


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    authority = Authority.create("test")
    node = Node(
        NodeConfig("controller", "c", tmp_path / "c", http_port=0, grpc_port=0, join_port=0, drain_s=0.5),
        authority.issue_identity("controller", "c"),
    )
    made = WorkerProcess(tmp_path, authority, Controller())  # type: ignore[abstract]
    for adder, module, service in (
        (registry_pb2_grpc.add_RegistryServicer_to_server, registry_pb2, "Registry"),
        (heartbeat_pb2_grpc.add_HeartbeatServicer_to_server, heartbeat_pb2, "Heartbeat"),
    ):
        node.service(made.controller, adder, module.DESCRIPTOR.services_by_name[service])
    folder = tmp_path / "w1"
    authority.issue_identity("worker", "w1").save(folder)
    await node.start()
    command = [sys.executable, "-m", "eldric.cli.main", "worker", "--folder", str(folder), "--http-port", "0"]
    command += ["--controller", node.grpc_address, "--models-dir", str(storyteller().parent), "--threads", "1"]
    process = await asyncio.create_subprocess_exec(*command, "--quiet", start_new_session=True)
    try:
        async with asyncio.timeout(30):
            while (document := node_file.read(folder)) is None or not made.controller.beats:
                await asyncio.sleep(0.02)
        made.document = dict(document)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await node.stop()


async def test_stages_over_rest(worker: WorkerProcess) -> None:
    worker.controller.wanted.append(heartbeat_pb2.WantedStage(pipeline_id="p1", epoch=1, index=0))
    body = json_format.MessageToDict(load_request(storyteller()))
    async with worker.http() as client:
        answer = await client.post("/api/v1/pipeline/load", json=body)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        events = [
            json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data")
        ]
        assert events[0]["progress"]["phase"] == "mapping"
        assert events[-1]["loaded"]["endpoint"]["address"].startswith("zmq://127.0.0.1:")

        again = await client.post("/api/v1/pipeline/load", json=body, headers={"accept": "application/json"})
        assert (again.status_code, again.json()["error"]["status"]) == (409, "ALREADY_EXISTS")

        (stage,) = (await client.get("/api/v1/pipeline/status")).json()["stages"]
        assert (stage["pipeline_id"], stage["state"], stage["layers"]["end"]) == ("p1", "LOADED", 6)
        assert stage["options"]["context"] == 256 and stage["options"]["chunk"] == 64
        nothing = (await client.get("/api/v1/pipeline/status", params={"pipeline_id": "p2"})).json()
        assert not nothing.get("stages")

        metrics = (await client.get("/metrics")).text
        assert 'eldric_stage_memory_bytes{kind="kv",pipeline="tale",stage="0"}' in metrics

        unloaded = await client.post("/api/v1/pipeline/unload", json={"pipeline_id": "p1"})
        assert unloaded.json()["unloaded"] == 1
        assert not (await client.get("/api/v1/pipeline/status")).json().get("stages")

        for wrong, code in (({"pipeline_id": 3}, 400), ({**body, "epoch": "x"}, 400), ({**body, "source": {}}, 400)):
            refused = await client.post("/api/v1/pipeline/load", json=wrong, headers={"accept": "application/json"})
            assert refused.status_code == code, refused.text


async def test_a_stage_that_its_controller_does_not_want_is_unloaded(worker: WorkerProcess) -> None:
    async with worker.channel("controller") as connection:
        stub: Any = stage_pb2_grpc.StageStub(connection)
        async for _ in stub.Load(load_request(storyteller())):
            pass
        async with asyncio.timeout(5):
            while (await stub.Status(stage_pb2.StageStatusRequest())).stages:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            while worker.controller.beats[-1].stages or worker.controller.beats[-1].memory_used_bytes:
                await asyncio.sleep(0.05)


async def test_a_newer_controller_does_no_harm(worker: WorkerProcess) -> None:
    """What it asks for, and what it answers to beats, has fields that this worker does not know."""
    want = heartbeat_pb2.WantedStage(pipeline_id="p1", epoch=1, index=0)
    worker.controller.wanted.append(newer(want))
    async with worker.channel("controller") as connection:
        stub: Any = stage_pb2_grpc.StageStub(connection)
        async for event in stub.Load(newer(load_request(storyteller()))):
            last = event
        assert last.HasField("loaded")
        await stub.Connect(newer(stage_pb2.ConnectRequest(pipeline_id="p1", epoch=1)))
        (stage,) = (await stub.Status(newer(stage_pb2.StageStatusRequest()))).stages
        assert stage.state == stage_pb2.SERVING
        begun = len(worker.controller.beats)
        async with asyncio.timeout(5):
            while len(worker.controller.beats) < begun + 5:  # more answers than a stage that is not wanted lives
                await asyncio.sleep(0.05)
        assert worker.controller.beats[-1].stages[0].state == stage_pb2.SERVING
        assert (await stub.Unload(newer(stage_pb2.UnloadRequest(pipeline_id="p1")))).unloaded == 1


async def test_callers_may_do_what_their_kind_may(worker: WorkerProcess) -> None:
    async with httpx.AsyncClient(verify=False) as stranger:
        with pytest.raises(httpx.TransportError):
            await stranger.get(f"{worker.document['http_url']}/api/v1/pipeline/status")
    async with worker.http("router") as client:
        refused = await client.post("/api/v1/pipeline/unload", json={"pipeline_id": "p1"})
        assert (refused.status_code, refused.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
    async with worker.channel("router") as connection:
        stages: Any = stage_pb2_grpc.StageStub(connection)
        with pytest.raises(PermissionDenied, match="may not call"), call_errors():
            async for _ in stages.Load(load_request(storyteller())):
                pass
        inference: Any = inference_pb2_grpc.InferenceStub(connection)
        with pytest.raises(NotFound, match="not the head of a pipeline 'tale'"), call_errors():
            async for _ in inference.Generate(inference_pb2.GenerateRequest(model="tale")):
                pass


async def test_a_load_call_that_is_cancelled_leaves_nothing(worker: WorkerProcess) -> None:
    worker.controller.wanted.append(heartbeat_pb2.WantedStage(pipeline_id="p1", epoch=1, index=0))
    async with worker.channel("controller") as connection:
        stub: Any = stage_pb2_grpc.StageStub(connection)
        call = stub.Load(load_request(storyteller()))
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            while (await stub.Status(stage_pb2.StageStatusRequest())).stages:
                await stub.Unload(stage_pb2.UnloadRequest(pipeline_id="p1"))
        async for event in stub.Load(load_request(storyteller())):
            last = event
        assert last.HasField("loaded")
        with pytest.raises(AlreadyExists), call_errors():
            async for _ in stub.Load(load_request(storyteller())):
                pass
