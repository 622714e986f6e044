"""Processes whose links go by different transports: shared memory between two, sockets to one in a container."""

import asyncio
import time
from pathlib import Path

import pytest

from eldric.client.types import PipelineInfo
from eldric.errors import Unavailable
from eldric.transport.registry import offers
from eldric.v1 import stage_pb2
from tests.e2e.clusters import CONTAINER, LiveCluster, local_cluster, tokens_until

WORKERS = ("worker-1", "worker-2", "worker-3")

#: Far below the 3 s of silence after which a neighbour is lost that did not close its connections.
SOON_S = 0.5


pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(not CONTAINER, reason="this system gives no namespaces"),
    pytest.mark.skipif("shm" not in offers(), reason="there is no shared memory transport on this system"),
]


def transports(info: PipelineInfo) -> list[str]:
    return [stage.link.transport if stage.link else "" for stage in info.stages]


async def until_broken(cluster: LiveCluster, worker: str) -> float:
    """When a worker's stage had noticed that a neighbour is gone."""
    async with asyncio.timeout(10):
        while True:
            (stage,) = await cluster.stages_held(worker)
            if stage.state == stage_pb2.BROKEN:
                return time.monotonic()
            await asyncio.sleep(0.002)


async def test_links_of_one_host_go_by_shared_memory_and_ends_are_noticed_on_each(tmp_path: Path) -> None:
    async with local_cluster(tmp_path) as cluster:
        await cluster.add_endless()
        assert transports(await cluster.deploy_endless()) == ["shm"] * 3
        answer = (await tokens_until(cluster.endless(), 20))[:20]
        await cluster.client.undeploy("endless")
        await cluster.restart("worker-2", within=CONTAINER)
        info = await cluster.deploy_endless()
        assert [stage.worker for stage in info.stages] == list(WORKERS)
        assert transports(info) == ["zmq", "zmq", "shm"] and not any(s.link.fallback for s in info.stages if s.link)
        await cluster.until_routed()
        assert (await tokens_until(cluster.endless(), 20))[:20] == answer
        for victim in ("worker-3", "worker-1"):
            events = cluster.endless()
            await tokens_until(events, 5)
            killed = time.monotonic()
            cluster.process(victim).kill()
            noticed = await asyncio.gather(*(until_broken(cluster, each) for each in WORKERS if each != victim))
            assert max(noticed) - killed < SOON_S
            with pytest.raises(Unavailable):
                async for _ in events:
                    pass
            await cluster.up()
            assert transports(await cluster.until_state("ready")) == ["zmq", "zmq", "shm"]
            await cluster.until_routed()
            assert (await tokens_until(cluster.endless(), 20))[:20] == answer
