"""Pipelines over UCX, and links that cannot have the best transport of their ends: `status` says what they go by."""

import asyncio
import os
import resource
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from eldric.client.types import PipelineInfo
from eldric.errors import NotReady, Unavailable
from eldric.transport.registry import offers
from tests.e2e.cli import Cli
from tests.e2e.clusters import CONTAINER, ENDLESS, LiveCluster, local_cluster, tokens_until

pytestmark = pytest.mark.timeout(90)

UCX = pytest.mark.skipif(not find_spec("ucxx"), reason="UCX is not installed: eldric[ucx]")
SHM = pytest.mark.skipif("shm" not in offers(), reason="there is no shared memory transport on this system")
TRUSTING = ("--trust-fabric",)

#: Far below the 3 s of silence after which a neighbour is lost that did not close its connections.
SOON_S = 1.0


def links(info: PipelineInfo) -> list[tuple[str, str]]:
    """Transport and encryption of each link."""
    return [(stage.link.transport, stage.link.encryption) for stage in info.stages if stage.link]


def fallbacks(info: PipelineInfo) -> list[str]:
    return [stage.link.fallback for stage in info.stages if stage.link]


async def answer(cluster: LiveCluster) -> list[int]:
    return await tokens_until(cluster.endless(max_tokens=20), 20)


async def until_links(cluster: LiveCluster, schemes: list[str]) -> PipelineInfo:
    """Until the links go by these transports; better ones are tried 10 s after a deployment for the first time."""
    async with asyncio.timeout(30):
        info = await cluster.pipeline()
        while [scheme for scheme, _ in links(info)] != schemes:
            await asyncio.sleep(0.1)
            info = await cluster.pipeline()
    return info


@UCX
async def test_a_pipeline_over_ucx_says_the_same_and_notices_who_dies(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, flags=TRUSTING) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless(transport="zmq")
        expected = await answer(cluster)
        await cluster.client.undeploy(ENDLESS)
        cli = Cli(tmp_path, {"ELDRIC_DIR": str(cluster.folder)})
        await asyncio.to_thread(cli, "deploy", ENDLESS, "--stages", 3, "--ctx", 16384, "--transport", "ucx")
        assert links(await cluster.pipeline()) == [("ucx", "none")] * 3
        assert (await asyncio.to_thread(cli, "status", ENDLESS)).out.count("NONE") == 3
        await cluster.until_routed()
        assert await answer(cluster) == expected
        events = cluster.endless()
        await tokens_until(events, 5)
        os.kill(cluster.node("worker-2").pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(Unavailable, match=r"stage 1 of 3 on worker worker-2 is gone: its (connection|process)"):
            await tokens_until(events, 1 << 20)
        assert time.monotonic() - killed < SOON_S
        await cluster.up()
        assert links(await cluster.until_state("ready")) == [("ucx", "none")] * 3
        await cluster.until_routed()
        assert await answer(cluster) == expected


@UCX
async def test_ucx_is_for_those_who_trust_the_fabric(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, 2) as cluster:
        await cluster.add_endless()
        with pytest.raises(NotReady, match="worker-1: offers no transport 'ucx', only shm, zmq"):
            await cluster.deploy_endless(stages=2, transport="ucx")


@UCX
@pytest.mark.skipif(not CONTAINER, reason="this system gives no namespaces")
async def test_a_worker_whose_ucx_does_not_work_is_reached_by_zmq(tmp_path: Path) -> None:
    async with local_cluster(tmp_path, flags=TRUSTING) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless()
        expected = await answer(cluster)
        await cluster.client.undeploy(ENDLESS)
        await cluster.restart("worker-2", within=CONTAINER, environment={"UCX_TLS": "pigeons"})
        info = await cluster.deploy_endless()
        assert links(info) == [("zmq", "curve"), ("zmq", "curve"), ("shm", "host")]
        first, second, third = fallbacks(info)
        assert first.startswith("ucx failed: ") and second.startswith("ucx failed: ") and not third, info
        await cluster.until_routed()
        assert await answer(cluster) == expected
        await cluster.client.undeploy(ENDLESS)
        await cluster.restart("worker-2", within=CONTAINER, environment={"UCX_TLS": "tcp"})
        info = await cluster.deploy_endless()
        assert links(info) == [("ucx", "none"), ("ucx", "none"), ("shm", "host")] and not any(fallbacks(info))
        await cluster.until_routed()
        assert await answer(cluster) == expected


@SHM
@pytest.mark.skipif(not shutil.which("prlimit"), reason="this system has no prlimit")
@pytest.mark.slow
async def test_a_worker_that_gets_no_shared_memory_sends_by_zmq_until_it_does(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        await cluster.deploy_endless()
        expected = await answer(cluster)
        await cluster.client.undeploy(ENDLESS)
        await cluster.restart("worker-2", within=["prlimit", f"--fsize={64 << 20}:"])
        info = await cluster.deploy_endless()
        assert links(info) == [("shm", "host"), ("zmq", "curve"), ("shm", "host")]
        assert fallbacks(info)[1].startswith("shm failed: ") and "File too large" in fallbacks(info)[1]
        await cluster.until_routed()
        assert await answer(cluster) == expected
        cluster.process("worker-2").rlimit(psutil.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
        info = await until_links(cluster, ["shm"] * 3)
        assert not any(fallbacks(info)) and info.state == "ready" and info.epoch == 1
        assert await answer(cluster) == expected
