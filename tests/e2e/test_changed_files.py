"""A model's file is replaced, written to or cut while the workers' processes map it: nobody dies, and it is said."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from eldric.cli.local import LocalCluster
from eldric.cli.roster import Shape
from eldric.client import AsyncClient, Delta
from eldric.errors import DataLoss, EldricError
from tests.e2e.clusters import ENDLESS, LiveCluster, _up
from tests.models import SmallLlama, write_small_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LiveCluster]:
    """Two workers, and ENDLESS in the store, whose file is nobody else's; deployed with its weights mapped."""
    local = LocalCluster.create(tmp_path / "cluster", Shape(workers=2, threads=1))
    try:
        await asyncio.to_thread(_up, local)
        async with AsyncClient(folder=local.folder) as client:
            made = LiveCluster(local, client)
            await made.add_endless()
            shutil.copyfile(file_of(made), tmp_path / "good.gguf")
            await made.deploy_endless(stages=2, weights="mapped")
            yield made
    finally:
        await asyncio.to_thread(local.down, lambda line: None)


def file_of(cluster: LiveCluster) -> Path:
    return cluster.folder / "models" / ENDLESS / f"{ENDLESS}.gguf"


async def answer(cluster: LiveCluster) -> str:
    return (await cluster.client.complete(ENDLESS, "a b", max_tokens=8, temperature=0.0, ignore_eos=True)).text


async def until_told(cluster: LiveCluster, words: str, state: str) -> None:
    """Until the pipeline is in that state, and says so, or one of its stages does."""
    async with asyncio.timeout(30):
        while True:
            info = await cluster.pipeline()
            if info.state == state and words in " ".join([info.message, *(stage.message for stage in info.stages)]):
                return
            await asyncio.sleep(0.05)


async def test_a_file_with_another_in_its_place_is_mapped_on_and_not_loaded_again(
    cluster: LiveCluster, tmp_path: Path
) -> None:
    said, pids = await answer(cluster), cluster.pids()
    other = write_small_llama(tmp_path / "other.gguf", SmallLlama(layers=5))
    os.replace(other, file_of(cluster))
    await until_told(cluster, f"{ENDLESS}.gguf was replaced by another file; the stage goes on", "ready")
    assert await answer(cluster) == said
    with pytest.raises(DataLoss, match=rf"{ENDLESS}\.gguf"):
        await cluster.client.deploy(ENDLESS, name="again", stages=1, context=512)
    assert cluster.pids() == pids


def append(file: Path) -> None:
    with file.open("ab") as target:
        target.write(b"more")


def cut(file: Path) -> None:
    os.truncate(file, 4096)


@pytest.mark.parametrize("change", [append, cut])
async def test_a_file_that_is_written_to_or_cut_ends_its_pipeline_by_name_until_it_is_right_again(
    cluster: LiveCluster, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    said, pids, file = await answer(cluster), cluster.pids(), file_of(cluster)
    change(file)
    await until_told(cluster, f"{ENDLESS}.gguf was changed in place", "degraded")
    await until_told(cluster, "loading it again failed", "degraded")
    await until_told(cluster, f"{ENDLESS}.gguf has", "degraded")
    with pytest.raises(EldricError, match=ENDLESS):
        await answer(cluster)
    with pytest.raises(DataLoss, match=rf"{ENDLESS}\.gguf has \d+ bytes, it had"):
        await cluster.client.deploy(ENDLESS, name="again", stages=1, context=512)
    assert cluster.pids() == pids, "no worker died"
    os.replace(shutil.copyfile(tmp_path / "good.gguf", tmp_path / "new.gguf"), file)
    await cluster.until_state("ready", limit_s=60)
    assert await answer(cluster) == said


async def test_a_generation_that_runs_is_told_which_file_was_changed(cluster: LiveCluster) -> None:
    pids = cluster.pids()
    with pytest.raises(EldricError, match=rf"{ENDLESS}\.gguf was changed in place from \d+ to \d+ bytes"):
        first = True
        async for event in cluster.endless(max_tokens=10_000):
            if first and isinstance(event, Delta):
                append(file_of(cluster))
                first = False
    assert cluster.pids() == pids
