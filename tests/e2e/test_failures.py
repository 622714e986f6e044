"""What dies, and what is left: every test breaks a running cluster of real processes in one way."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from eldric.client import AsyncClient
from eldric.client.types import Delta, Finished, PipelineInfo, StageProgress
from eldric.errors import Unavailable
from tests.e2e.clusters import (
    ENDLESS,
    STORY,
    LiveCluster,
    listening,
    local_cluster,
    runs,
    tokens_until,
    until,
)

pytestmark = pytest.mark.timeout(60)

#: A second, and what a busy machine adds.
SOON_S = 1.5


def openai_client(cluster: LiveCluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.router_url}/v1", api_key="any", max_retries=0)


async def endless_stream(client: openai.AsyncOpenAI) -> Any:
    """A stream of text that has begun to flow."""
    stream = await client.completions.create(
        model=ENDLESS, prompt="a b", temperature=0.0, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    return stream


async def read(events: Any) -> None:
    """To the end, or the error."""
    async for _ in events:
        pass


async def end_of(events: Any) -> tuple[Exception | None, float]:
    """The error in which a stream ends, and when it did."""
    try:
        await read(events)
    except Exception as error:
        return error, time.monotonic()
    return None, time.monotonic()


async def test_a_worker_killed_midway_ends_the_streams_and_the_others_go_on(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        await cluster.add_endless()
        await cluster.deploy_endless()
        ours, theirs = cluster.endless(), await endless_stream(client)
        await tokens_until(ours, 20)
        ending = [asyncio.create_task(end_of(events)) for events in (ours, theirs)]

        os.kill(cluster.node("worker-2").pid, signal.SIGKILL)
        killed = time.monotonic()
        for (error, at), kind in zip(await asyncio.gather(*ending), (Unavailable, openai.APIError), strict=True):
            assert isinstance(error, kind) and "stage 1 of 3 on worker worker-2 is gone: its connection" in str(error)
            assert at - killed < SOON_S

        info = await cluster.until_state("degraded", limit_s=SOON_S)
        assert info.message.startswith("stage 1 of 3 on worker worker-2 is gone: ")
        with pytest.raises(Unavailable, match="worker-2"):
            await read(cluster.endless())
        with pytest.raises(openai.APIStatusError, match="worker-2") as refused:
            await endless_stream(client)
        assert refused.value.status_code == 503

        await cluster.client.undeploy(ENDLESS)
        assert not await cluster.stages_held("worker-1") and not await cluster.stages_held("worker-3")
        assert all(worker.memory_used_bytes == 0 for worker in await cluster.client.workers() if worker.state == "up")
        info = await cluster.deploy_endless(stages=2)
        assert {stage.worker for stage in info.stages} == {"worker-1", "worker-3"}
        assert len(await tokens_until(cluster.endless(), 20)) >= 20


async def test_what_a_killed_worker_held_is_loaded_again_when_it_is_back(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        before = await cluster.deploy_endless()
        answer = (await tokens_until(cluster.endless(), 20))[:20]
        await cluster.kill("worker-2")
        await cluster.until_state("degraded")
        await cluster.up()
        info = await cluster.until_state("ready")
        assert info.epoch == before.epoch + 1
        assert [stage.worker for stage in info.stages] == [stage.worker for stage in before.stages]
        await cluster.until_routed()
        assert (await tokens_until(cluster.endless(), 20))[:20] == answer


async def test_pipelines_are_back_after_down_and_up(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        before = await cluster.deploy_endless()
        answer = (await tokens_until(cluster.endless(), 20))[:20]
        assert await cluster.down() == []
        await cluster.up()
        async with AsyncClient(folder=cluster.folder) as client:
            back = LiveCluster(cluster.local, client)
            info = await back.until_state("ready")
            assert (info.id, info.epoch) == (before.id, before.epoch + 1)
            await back.until_routed()
            assert (await tokens_until(back.endless(), 20))[:20] == answer


async def test_a_worker_that_is_about_to_end_lets_go_on_what_runs_and_nothing_begins(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        await cluster.add_endless()
        await cluster.deploy_endless()
        events = cluster.endless(max_tokens=1000)
        await tokens_until(events, 20)
        process = cluster.process("worker-2")
        cluster.signal("worker-2", signal.SIGTERM)
        await cluster.until_state("degraded", limit_s=SOON_S)
        with pytest.raises(Unavailable, match="stage 1 of 3 on worker worker-2 is closing"):
            await read(cluster.endless())
        with pytest.raises(openai.APIStatusError, match="worker-2 is closing") as refused:
            await endless_stream(client)
        assert refused.value.status_code == 503
        finished = [event async for event in events][-1]
        assert isinstance(finished, Finished) and finished.reason == "length"
        await until(lambda: not runs(process))


async def test_a_rebalance_ends_what_runs_with_an_error_that_says_so(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        await cluster.add_endless()
        await cluster.deploy_endless()
        running = [cluster.endless(), await endless_stream(client)]
        ending = [asyncio.create_task(end_of(events)) for events in running]
        await cluster.until_taken(2)
        cluster.signal("worker-2", signal.SIGTERM)  # so that there is something to move
        await cluster.until_state("degraded", limit_s=SOON_S)
        info = [event async for event in cluster.client.rebalance_events(ENDLESS)][-1]
        assert isinstance(info, PipelineInfo)
        assert (info.state, {stage.worker for stage in info.stages}) == ("ready", {"worker-1", "worker-3"})
        for (error, _), kind in zip(await asyncio.gather(*ending), (Unavailable, openai.APIError), strict=True):
            assert isinstance(error, kind) and "was rebalanced" in str(error) and "send the request again" in str(error)
        assert len(await tokens_until(cluster.endless(), 20)) >= 20


async def test_a_deploy_that_a_worker_does_not_survive_leaves_nothing_on_the_others(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        cluster.signal("worker-2", signal.SIGSTOP)  # so that its stage is still loading when it dies
        deploying = cluster.client.deploy_events(ENDLESS, stages=3)
        loaded: set[str] = set()
        with pytest.raises(Unavailable, match="worker-2"):
            async for event in deploying:
                if isinstance(event, StageProgress) and event.phase == "loaded":
                    loaded.add(event.worker)
                if loaded == {"worker-1", "worker-3"}:
                    killed = time.monotonic()
                    await cluster.kill("worker-2")
                    loaded.clear()
        assert time.monotonic() - killed < 2.0
        assert not await cluster.client.status()
        assert not await cluster.stages_held("worker-1") and not await cluster.stages_held("worker-3")
        await cluster.up()  # the worker again, in a new process
        assert (await cluster.deploy_endless(stages=3)).state == "ready"


async def test_a_deploy_whose_caller_leaves_is_undone(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, workers=2) as cluster:
        await cluster.add_endless()
        cluster.signal("worker-2", signal.SIGSTOP)
        deploying = cluster.client.deploy_events(ENDLESS, stages=2)
        async for event in deploying:
            if isinstance(event, StageProgress) and (event.worker, event.phase) == ("worker-1", "loaded"):
                break
        await deploying.aclose()
        cluster.signal("worker-2", signal.SIGCONT)
        await cluster.until_empty("worker-1", "worker-2")
        async with asyncio.timeout(5):
            while await cluster.client.status():
                await asyncio.sleep(0.02)
        await cluster.deploy_endless(stages=2)
        assert len(await tokens_until(cluster.endless(), 5)) >= 5


async def test_a_frozen_worker_is_noticed_and_goes_on_when_it_wakes(tmp_path: Path) -> None:
    silence_s = 3.0  # of tensor links and of leases, by default
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless()
        answer = (await tokens_until(cluster.endless(), 20))[:20]
        pids = cluster.pids()
        events = cluster.endless()
        await tokens_until(events, 20)
        cluster.signal("worker-2", signal.SIGSTOP)
        frozen = time.monotonic()
        with pytest.raises(Unavailable, match="stage 1 of 3 on worker worker-2 is gone: "):
            await read(events)
        assert time.monotonic() - frozen < silence_s + 1.0
        await cluster.until_state("degraded", limit_s=SOON_S)
        cluster.signal("worker-2", signal.SIGCONT)
        await cluster.until_state("ready")
        assert (await tokens_until(cluster.endless(), 20))[:20] == answer
        assert cluster.pids() == pids


async def test_a_head_that_was_frozen_says_so_and_blames_nobody(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, workers=2) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless(stages=2)
        events = cluster.endless()
        await tokens_until(events, 20)
        cluster.signal("worker-1", signal.SIGSTOP)
        async with asyncio.timeout(10):
            while (await cluster.pipeline()).stages[1].state != "broken":
                await asyncio.sleep(0.05)
        cluster.signal("worker-1", signal.SIGCONT)
        with pytest.raises(Unavailable, match=r"stage 0 of 2 on worker worker-1 (stood still for|is gone: no beat)"):
            await read(events)
        await cluster.until_state("ready")


async def test_generation_goes_on_without_a_controller_and_the_next_one_finds_everything(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        await cluster.add_endless()
        epoch = (await cluster.deploy_endless()).epoch
        events = cluster.endless()
        await tokens_until(events, 20)
        await cluster.kill("controller")
        await (await endless_stream(client)).close()  # a new one begins
        await tokens_until(events, 200)

        await cluster.up()
        info = await cluster.until_state("ready", limit_s=5.0)
        assert (info.epoch, len(info.stages)) == (epoch, 3)
        await tokens_until(events, 50)
        await events.aclose()  # type: ignore[attr-defined]
        await cluster.until_free()
        await cluster.client.undeploy(ENDLESS)
        await cluster.until_empty("worker-1", "worker-2", "worker-3")


async def test_a_deploy_that_its_controller_does_not_survive_is_undone(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, workers=2) as cluster:
        await cluster.add_endless()
        cluster.signal("worker-2", signal.SIGSTOP)
        with pytest.raises(Unavailable, match="controller"):
            async for event in cluster.client.deploy_events(ENDLESS, stages=2):
                if isinstance(event, StageProgress) and (event.worker, event.phase) == ("worker-1", "loaded"):
                    await cluster.kill("controller")
        assert len(await cluster.stages_held("worker-1")) == 1
        cluster.signal("worker-2", signal.SIGCONT)
        await cluster.up()
        assert not await cluster.client.status()
        await cluster.until_empty("worker-1", "worker-2")
        await cluster.deploy_endless(stages=2)
        await cluster.until_routed()
        assert len(await tokens_until(cluster.endless(), 5)) >= 5


async def test_a_deploy_whose_controller_is_killed_at_any_line_is_done_or_undone_as_a_whole(tmp_path: Path) -> None:
    workers = ("worker-1", "worker-2", "worker-3")
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_story()
        for phase in ("mapping", "loaded", "connected"):
            with contextlib.suppress(Unavailable):
                async for event in cluster.client.deploy_events(STORY, stages=3):
                    told = isinstance(event, StageProgress) and event.phase == phase
                    if told and cluster.node("controller").running:  # what it said before its end still comes
                        await cluster.kill("controller")
            await cluster.up()
            if await cluster.client.status():  # it was kept as running before the kill
                await cluster.until_state("ready", STORY)
                await cluster.client.undeploy(STORY)
            await cluster.until_empty(*workers)
            await cluster.client.deploy(STORY, stages=3)
            assert (await cluster.client.complete(STORY, "Once", max_tokens=2)).tokens
            await cluster.client.undeploy(STORY)
            async with asyncio.timeout(5):
                while any(worker.memory_used_bytes for worker in await cluster.client.workers()):
                    await asyncio.sleep(0.02)


async def test_a_router_that_dies_gives_the_slots_back(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, workers=2) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless(stages=2)
        running = [cluster.endless() for _ in range(3)]  # one more than there are slots
        await asyncio.gather(*(tokens_until(events, 5) for events in running[:2]))
        waiting = asyncio.create_task(tokens_until(running[2], 1))
        await cluster.until_taken(3)
        await cluster.kill("router")
        await cluster.until_free()
        for events in running[:2]:
            with pytest.raises(Unavailable):
                await read(events)
        with pytest.raises(Unavailable):
            await waiting
        await cluster.up()
        assert len(await tokens_until(cluster.endless(), 5)) >= 5


async def test_down_lets_what_runs_end_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for variable in ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(outside))
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless()
        events = cluster.endless(max_tokens=600)
        await tokens_until(events, 20)
        processes = {name: psutil.Process(pid) for name, pid in cluster.pids().items()}
        ports = listening(*(process.pid for process in processes.values()))
        assert len(ports) >= 2 * len(processes)
        written = [Path(file.path) for each in processes.values() for file in each.open_files() if file.mode != "r"]
        assert written and all(cluster.folder in path.parents for path in written)

        ending = asyncio.create_task(cluster.down())
        last = [event async for event in events][-1]
        assert isinstance(last, Finished) and (last.reason, last.completion_tokens) == ("length", 600)
        assert await ending == [], "nobody had to be killed"
        await until(lambda: not any(map(runs, processes.values())), SOON_S)
        assert not ports & listening()
        kept = outside / "eldric" / "kernels"  # compiled once for all clusters of a user
        assert {path for path in outside.rglob("*") if kept not in path.parents} <= {kept, kept.parent}
        assert not list(cluster.folder.rglob("node.json")) + list(cluster.folder.rglob("*.partial"))


async def test_a_second_sigterm_ends_a_worker_at_once(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, workers=2) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless(stages=2)
        events = cluster.endless()
        await tokens_until(events, 20)
        worker = cluster.process("worker-2")
        worker.terminate()
        async with asyncio.timeout(5):
            while {each.name: each.state for each in await cluster.client.workers()}["worker-2"] != "draining":
                await asyncio.sleep(0.01)
        assert len(await tokens_until(events, 50)) >= 50, "the first one lets it finish"
        worker.terminate()
        ended = time.monotonic()
        await until(lambda: not runs(worker), SOON_S)
        with pytest.raises(Unavailable, match="stage 1 of 2 on worker worker-2 is gone"):
            async for event in events:
                assert isinstance(event, Delta)
        assert time.monotonic() - ended < SOON_S
