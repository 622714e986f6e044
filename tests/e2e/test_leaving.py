"""Clients that go away, pipelines and files that do: what was running ends, and nothing is held for it any more."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eldric.channels import call_errors
from eldric.errors import EldricError, NotFound, NotReady, Unavailable
from eldric.names import split_address
from eldric.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from tests.e2e.cli import Cli
from tests.e2e.clusters import ENDLESS, LiveCluster, attached, endless_on, tokens_until
from tests.e2e.conftest import Cluster
from tests.models import SmallLlama, write_small_llama
from tests.rings import source_of

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def live(cluster: Cluster, tmp_path: Path) -> AsyncIterator[LiveCluster]:
    async with endless_on(cluster.folder, tmp_path) as made:
        yield made


async def http_stream(live: LiveCluster) -> asyncio.StreamWriter:
    """A connection over which a streamed answer has begun to come."""
    host, port = split_address(live.router_url.removeprefix("http://"))
    reader, writer = await asyncio.open_connection(host, port)
    request = {"model": ENDLESS, "prompt": "a b", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
    assert b"200" in await reader.readline()
    await reader.readuntil(b"data: ")
    return writer


async def test_a_closed_socket_frees_the_slots_of_every_stage(live: LiveCluster) -> None:
    writers = [await http_stream(live), await http_stream(live)]
    await live.until_taken(2)
    assert all(await live.slots_used())
    for writer in writers:
        writer.transport.abort()
    await live.until_free()


async def test_a_client_that_is_killed_frees_the_slots_of_every_stage(live: LiveCluster, cli: Cli) -> None:
    process = cli.start("run", ENDLESS, "a b", "--raw", "--ignore-eos")
    try:
        await live.until_taken(1)
        process.kill()
        await live.until_free()
    finally:
        process.kill()
        process.communicate()


async def test_those_who_leave_the_queue_leave_nothing(live: LiveCluster) -> None:
    running = [live.endless() for _ in range(2)]
    await asyncio.gather(*(tokens_until(events, 1) for events in running))
    waiting = [asyncio.create_task(tokens_until(live.endless(), 1)) for _ in range(4)]
    await live.until_taken(6)
    for task in waiting[1:]:
        task.cancel()
    await live.until_taken(3)
    for events in running:
        await events.aclose()  # type: ignore[attr-defined]
    assert await waiting[0]
    await live.until_free()


async def test_undeploying_ends_what_runs_and_what_waits(live: LiveCluster) -> None:
    running = [live.endless() for _ in range(2)]
    await asyncio.gather(*(tokens_until(events, 1) for events in running))
    waiting = asyncio.create_task(tokens_until(live.endless(), 1))
    await live.until_taken(3)
    async with asyncio.timeout(2):
        await live.client.undeploy(ENDLESS)
        for events in running:
            with pytest.raises(Unavailable, match="undeployed"):
                await tokens_until(events, 100_000)
        with pytest.raises(Unavailable, match="undeployed"):
            await waiting
    assert ENDLESS not in {
        stage.name for worker in ("worker-1", "worker-2") for stage in await live.stages_held(worker)
    }
    with pytest.raises(NotFound, match="not deployed"):
        await tokens_until(live.endless(), 1)


async def test_an_idle_pipeline_is_undeployed_at_once(live: LiveCluster) -> None:
    async with asyncio.timeout(1.0):  # compute threads that miss their wakes take twice as long
        await live.client.undeploy(ENDLESS)


async def load(live: LiveCluster, source: stage_pb2.ModelSource) -> None:
    """Ask worker-1 for a stage of that file, as a controller does that planned for it a moment ago."""
    channel = live.client.channel(live.node("worker-1").grpc_address, "worker", "worker-1")
    layers = common_pb2.LayerRange(end=2)
    request = stage_pb2.LoadRequest(pipeline_id="p", name="p", epoch=1, stage_count=1, layers=layers, source=source)
    with call_errors():
        async for _ in stage_pb2_grpc.StageStub(channel).Load(request):
            pass


async def test_a_file_that_changed_after_planning_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """What a worker maps must be what was planned, or its tokens would be another model's."""
    path = cluster.folder / "models" / "changed.gguf"
    try:
        write_small_llama(path, SmallLlama(seed=1))
        planned = source_of(path)
        async with attached(cluster.folder) as live:
            other = write_small_llama(tmp_path / "other.gguf", SmallLlama(seed=1), metadata={"general.name": "other"})
            with_other_size = other.read_bytes()
            path.write_bytes(with_other_size)
            with pytest.raises(NotReady, match=f"has {len(with_other_size)} bytes here"):
                await load(live, planned)
            write_small_llama(path, SmallLlama(seed=1, rope_base=20000.0))
            with pytest.raises(NotReady, match="header differs"):
                await load(live, planned)
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(NotReady, match="bytes here"):
                await load(live, planned)
            path.unlink()
            with pytest.raises(NotFound, match=r"changed\.gguf"):
                await load(live, planned)
            assert "p" not in {stage.pipeline_id for stage in await live.stages_held("worker-1")}
    finally:
        path.unlink(missing_ok=True)


async def test_a_truncated_file_in_the_store_is_not_deployed(cluster: Cluster, tmp_path: Path) -> None:
    async with attached(cluster.folder) as live:
        await live.client.models.add(write_small_llama(tmp_path / "short.gguf", SmallLlama()), "short")
        try:
            (path,) = (cluster.folder / "models").rglob("short*.gguf")
            path.chmod(0o644)
            os.truncate(path, path.stat().st_size - 1000)
            with pytest.raises(EldricError, match="short") as refused:
                await live.client.deploy("short", stages=2)
            assert refused.value.status in ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"), refused.value
            assert "short" not in {info.name for info in await live.client.status()}
        finally:
            await live.client.models.remove("short")
