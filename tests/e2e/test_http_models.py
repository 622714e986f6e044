"""Workers without a mount: a model that two data workers hold is deployed over HTTP, and each byte is sent once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eldric.cli.local import LocalCluster
from eldric.cli.roster import NodeEntry, Shape
from eldric.client import AsyncClient, PipelineInfo, StageProgress
from eldric.security import Authority
from tests.e2e.cli import Cli
from tests.e2e.clusters import LiveCluster, _up, runs, until
from tests.models import SmallLlama, write_small_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]

MODEL = "big"
#: Of 36 MB, in F16: its small vocabulary makes the header short beside it.
SHAPE = SmallLlama(layers=12, hidden=512, heads=8, kv_heads=8, head_dim=64, ffn=256, context=512, type="F16")
DATA = ("data", "data-2")


def without_mounts(folder: Path) -> LocalCluster:
    """Three workers that read over HTTP into caches of their own, and a second data worker."""
    local = LocalCluster.create(folder / "cluster", Shape(workers=3, threads=1))
    second = NodeEntry("data", "data-2", ("--http-port", "0", "--models", str(local.folder / "models-2")))
    nodes = [*local.nodes, second]
    local.nodes = [_over_http(entry) if entry.kind == "worker" else entry for entry in nodes]
    authority = Authority.load(local.folder / "controller" / "authority")
    authority.issue_identity("data", "data-2").save(local.folder / second.folder)
    (local.folder / "models-2").mkdir()
    local.save()
    return local


def _over_http(entry: NodeEntry) -> NodeEntry:
    at = entry.arguments.index("--models-dir")
    return NodeEntry(entry.kind, entry.name, (*entry.arguments[:at], "--models", "http", *entry.arguments[at + 2 :]))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LiveCluster]:
    local = without_mounts(tmp_path)
    try:
        await asyncio.to_thread(_up, local)
        async with AsyncClient(folder=local.folder) as client:
            await client.models.add(write_small_llama(tmp_path / "big.gguf", SHAPE), MODEL)
            yield LiveCluster(local, client)
    finally:
        await asyncio.to_thread(local.down, lambda line: None)


async def sent(cluster: LiveCluster) -> int:
    """Bytes that the data workers that run sent over HTTP, by their own count."""
    total = 0
    for name in DATA:
        if cluster.node(name).running:
            total += int((await cluster.metrics(name))["eldric_data_served_bytes_total", "content"])
    return total


async def deploy(cluster: LiveCluster, layers: list[int], kill: str = "") -> set[str]:
    """Deploy over three stages; returns the phases that were told. kill: a data worker, at the first byte."""
    phases = set()
    events = cluster.client.deploy_events(MODEL, layers=layers, context=256, slots=1)
    async with contextlib.aclosing(events) as each:
        async for event in each:
            if isinstance(event, StageProgress):
                phases.add(event.phase)
                if kill and event.phase == "fetching":
                    await cluster.kill(kill)
                    kill = ""
            if isinstance(event, PipelineInfo):
                assert event.state == "ready"
    return phases


async def test_a_model_is_deployed_over_http_from_two_data_workers_and_one_may_die(cluster: LiveCluster) -> None:
    client = cluster.client
    cli = Cli(cluster.folder, {"ELDRIC_DIR": str(cluster.folder)})
    refused = await asyncio.to_thread(cli, "models", "replicate", MODEL, "--copies", 3, code=1)
    assert "3 copies: from 1 to 2, the number of data workers that are up" in refused.error
    made = (await asyncio.to_thread(cli, "models", "replicate", MODEL, "--json")).json
    assert made == {"model": MODEL, "data_workers": list(DATA)}
    assert (await client.models.replicate(MODEL, to="data-2")).data_workers == DATA, "it is there already"
    assert (await client.models.show(MODEL)).data_workers == DATA
    (listed,) = (await asyncio.to_thread(cli, "models", "ls", "--json")).json["models"]
    assert (listed["copies"], listed["copies_wanted"]) == (2, 2)
    assert "2 of 2" in (await asyncio.to_thread(cli, "models", "show", MODEL)).out
    assert [model.name for model in await client.models.list()] == [MODEL]
    size = (await client.models.show(MODEL)).info.size_bytes
    before = await sent(cluster)
    assert "fetching" in await deploy(cluster, [4, 4, 4])
    first = await sent(cluster) - before
    assert 0.99 * size <= first <= 1.02 * size, f"{first} bytes were sent of a model of {size}"
    for name in DATA:
        assert (await cluster.metrics(name))["eldric_data_served_bytes_total", "content"] > 0
    text = await client.complete(MODEL, "a b c", max_tokens=8, temperature=0.0, ignore_eos=True)
    assert text.finished.completion_tokens == 8
    await client.undeploy(MODEL)

    assert "fetching" not in await deploy(cluster, [4, 4, 4]), "all of it is in the caches"
    again = await client.complete(MODEL, "a b c", max_tokens=8, temperature=0.0, ignore_eos=True)
    assert again.text == text.text
    assert await sent(cluster) - before == first
    await client.undeploy(MODEL)

    process = cluster.process("data-2")
    assert "fetching" in await deploy(cluster, [2, 6, 4], kill="data-2")
    await until(lambda: not runs(process))
    other = await client.complete(MODEL, "a b c", max_tokens=8, temperature=0.0, ignore_eos=True)
    assert other.text == text.text
    await client.undeploy(MODEL)

    await client.models.remove(MODEL)
    assert await client.models.list() == []
