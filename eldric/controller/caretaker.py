"""Does what the pure parts ask for in the background: probes suspects, unloads strays, mends rings and betters their
links, loads again what is gone, lets time pass."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from eldric.controller.cluster import Chore, Cluster, Forget
from eldric.controller.deployer import Deployer
from eldric.controller.deployments import Improve, Mend, Orphan, Reload
from eldric.controller.metrics import ControllerMetrics
from eldric.controller.pipelines import Phase
from eldric.controller.registry import Probe
from eldric.controller.ring import RingMaker
from eldric.controller.workers import Workers
from eldric.errors import EldricError

#: How long a connection to a node that left is kept, so that calls to it end by themselves, in seconds.
FORGET_S = 60.0

log = logging.getLogger(__name__)


class Caretaker:
    """Starts each chore in a task of its own. A chore that fails is asked for again by whoever wanted it."""

    def __init__(
        self,
        cluster: Cluster,
        workers: Workers,
        rings: RingMaker,
        deployer: Deployer,
        metrics: ControllerMetrics,
        tick_s: float,
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._rings = rings
        self._deployer = deployer
        self._metrics = metrics
        self._tick_s = tick_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        self._spawn(self._tick())

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def perform(self, chore: Chore) -> None:
        if self._closed:
            return
        match chore:
            case Probe():
                self._spawn(self._probe(chore))
            case Orphan():
                self._spawn(self._unload(chore))
            case Mend():
                self._spawn(self._mend(chore))
            case Reload():
                self._spawn(self._reload(chore.pipeline_id))
            case Improve():
                self._spawn(self._improve(chore.pipeline_id))
            case Forget():
                self._spawn(self._forget(chore.address))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except EldricError as error:
            log.warning("event=chore_failed error=%r", error.message)
        except Exception:
            log.exception("event=chore_failed")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            try:
                self._cluster.tick()
            except Exception:  # the watch over the nodes must not end
                log.exception("event=tick_failed")

    async def _probe(self, probe: Probe) -> None:
        node = self._cluster.registry.get(probe.node_id)
        if node is None or node.info.incarnation != probe.incarnation:
            return
        alive = await self._workers.probe(node)
        result = {True: "answered", False: "refused", None: "silent"}[alive]
        self._metrics.probes.labels(result).inc()
        log.info("event=probed node=%s reason=%r result=%s", node.id, node.reason, result)
        self._cluster.probed(probe, alive)

    async def _unload(self, orphan: Orphan) -> None:
        """Unload a stage that nobody wants. While an older epoch of it is wanted, the worker must do it by itself:
        the call unloads every epoch up to the one it names."""
        key = orphan.key
        node = self._cluster.registry.get(orphan.node_id)
        wanted = [wanted.key for wanted in self._cluster.deployments.wanted(orphan.node_id)]
        if node is None or key in wanted:
            return
        if any((each.pipeline_id, each.index) == (key.pipeline_id, key.index) for each in wanted):
            return
        log.info("event=unloading_orphan node=%s pipeline=%s stage=%d", node.id, key.pipeline_id, key.index)
        await self._workers.unload(node, key.pipeline_id, key.epoch, key.index)

    async def _forget(self, address: str) -> None:
        await asyncio.sleep(FORGET_S)
        if all(node.info.grpc_address != address for node in self._cluster.nodes()):
            await self._workers.forget(address)

    async def _mend(self, mend: Mend) -> None:
        deployment = self._cluster.deployments.get(mend.pipeline_id)
        if deployment is None or deployment.record.phase is not Phase.RUNNING:
            return
        log.info("event=mending pipeline=%s", deployment.record.name)
        await self._rings.mend(deployment.record)
        for stage in deployment.record.stages:
            self._cluster.look_again(stage.node_id)

    async def _improve(self, pipeline_id: str) -> None:
        deployments, better = self._cluster.deployments, False
        deployment = deployments.get(pipeline_id)
        try:
            if deployment is not None:
                record = deployment.record
                better = await self._rings.improve(record, lambda: deployments.may_improve(record))
        finally:
            deployments.improved(pipeline_id, better=better)

    async def _reload(self, pipeline_id: str) -> None:
        problem = "it was interrupted"
        try:
            problem = await self._deployer.reload(pipeline_id)
        finally:
            self._cluster.reloaded(pipeline_id, problem)
