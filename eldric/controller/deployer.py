"""Deploys, undeploys, moves and reloads pipelines: decides by the planner, keeps by the store, acts by the ring maker.

Every step is kept before it is taken, so that a controller that is killed between two of them finds out what to do:

    deploy      keep "deploying" -> load, connect -> keep "running"
    undeploy    keep "undeploying" -> unload -> forget
    rebalance   keep the next stages -> load, connect -> keep them as the stages, one epoch on -> unload the old ones
    reload      unload what is left -> as a rebalance to the same layers on the same workers

At the next start, what is not running is forgotten and next stages are dropped; workers unload what is not wanted.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import replace

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.metrics import ControllerMetrics
from eldric.controller.operation import Operation, Work
from eldric.controller.pipelines import Phase, PipelineRecord
from eldric.controller.planning import Planning, pipeline_name
from eldric.controller.progress import Progress
from eldric.controller.rebalance import Rebalance
from eldric.controller.ring import RingMaker
from eldric.controller.state import Store
from eldric.errors import EldricError, NotReady, Unavailable
from eldric.v1 import pipeline_pb2

log = logging.getLogger(__name__)


class Deployer:
    """All work on pipelines. Each goes on in a task of its own: its caller may leave."""

    def __init__(
        self, cluster: Cluster, store: Store, planning: Planning, rings: RingMaker, metrics: ControllerMetrics
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._planning = planning
        self._rings = rings
        self._metrics = metrics
        self._rebalance = Rebalance(cluster, store, planning, rings)
        self._operations: dict[str, Operation] = {}  # by pipeline id
        self._preparing: list[str] = []  # models of deploys that are not among the pipelines yet
        self._background: set[asyncio.Future[None]] = set()
        self._closing = False

    async def recover(self, settle_by: float) -> None:
        """Take up what was kept: running pipelines go on, what was half done is forgotten.

        Workers that hold stages of forgotten pipelines are told to unload them as soon as they report.
        """
        for record in await self._store.pipelines():
            if record.phase is not Phase.RUNNING:
                log.info("event=deploy_undone pipeline=%s phase=%s", record.name, record.phase)
                await self._store.delete(record.id)
                continue
            if record.next_stages:
                log.info("event=rebalance_undone pipeline=%s", record.name)
                record = replace(record, next_stages=())
                await self._store.save(record)
            self._cluster.add(record, settle_by=settle_by)

    async def plan(self, request: pipeline_pb2.DeployRequest) -> pipeline_pb2.DeploymentPlan:
        """What a deploy would do now."""
        prepared = await self._planning.prepare(request)
        return convert.plan_message(self._planning.plan(prepared), request.model)

    def is_preparing(self, model: str) -> bool:
        """Whether a deploy has begun that the cluster's pipelines do not show yet."""
        return model in self._preparing

    def deploy(self, request: pipeline_pb2.DeployRequest) -> Operation:
        """Starts a deploy. Its error says what stopped it; then nothing of it is left."""
        pipeline_id = uuid.uuid4().hex

        async def load(operation: Operation) -> pipeline_pb2.PipelineInfo:
            with self._timed("deploy"):
                return await self._deploy(pipeline_id, request, operation)

        return self._start(pipeline_id, load)

    def rebalance(self, name: str) -> Operation:
        """Starts a move to the plan that is best now. Raises NotFound, NotReady while other work is going on."""
        record = self._cluster.deployments.find(name).record
        if record.id in self._operations or record.phase is not Phase.RUNNING:
            raise NotReady(f"pipeline {record.name!r} is being worked on: wait until that is over")

        async def move(operation: Operation) -> pipeline_pb2.PipelineInfo:
            with self._timed("rebalance"):
                return await self._rebalance.run(record, operation)

        return self._start(record.id, move)

    async def reload(self, pipeline_id: str) -> str:
        """Load the stages of a pipeline again on the same workers. Returns what went wrong.

        Empty when it is done, and when it could not begin, as other work on the pipeline is going on.
        """
        deployment = self._cluster.deployments.get(pipeline_id)
        if deployment is None or pipeline_id in self._operations or deployment.record.phase is not Phase.RUNNING:
            return ""
        record = deployment.record

        async def load(operation: Operation) -> pipeline_pb2.PipelineInfo:
            with self._timed("reload"):
                return await self._rebalance.reload(record, operation)

        try:
            async with contextlib.aclosing(self._start(pipeline_id, load).follow()) as events:
                async for _ in events:
                    pass
        except EldricError as error:
            log.warning("event=reload_failed pipeline=%s error=%r", record.name, error.message)
            return error.message
        return ""

    async def undeploy(self, name: str) -> None:
        """End a pipeline, a deploy of it included. Goes on when the caller leaves. Raises NotFound."""
        record = self._cluster.deployments.find(name).record
        await self._finish(self._undeploy(record.id))

    async def close(self) -> None:
        """Undo what is half done: the controller ends."""
        self._closing = True
        operations = list(self._operations.values())
        for operation in operations:
            operation.cancel()
        await asyncio.gather(*(operation.ended() for operation in operations))
        await asyncio.gather(*self._background, return_exceptions=True)

    def _start(self, pipeline_id: str, work: Work) -> Operation:
        if self._closing:
            raise Unavailable("this controller is ending")

        def ended() -> None:
            del self._operations[pipeline_id]

        operation = self._operations[pipeline_id] = Operation(work, ended)
        return operation

    async def _deploy(
        self, pipeline_id: str, request: pipeline_pb2.DeployRequest, operation: Operation
    ) -> pipeline_pb2.PipelineInfo:
        self._cluster.deployments.check_free(pipeline_name(request))
        self._preparing.append(request.model)
        try:
            prepared = await self._planning.prepare(request)
            made = self._planning.plan(prepared)
            record = self._planning.record(pipeline_id, prepared, made)
            self._cluster.add(record)  # from here on its memory is promised, and its name taken
        finally:
            self._preparing.remove(request.model)
        log.info("event=deploying pipeline=%s id=%s stages=%d", record.name, record.id, len(record.stages))
        try:
            await self._store.save(record)
            operation.emit(pipeline_pb2.DeployEvent(plan=convert.plan_message(made, record.model)))
            progress = Progress(
                record.stages, operation.emit_stage, lambda line, share: self._cluster.note(record.id, line, share)
            )
            await self._rings.make(record, record.stages, record.epoch, progress)
            record = replace(record, phase=Phase.RUNNING)
            await self._store.save(record)
        except BaseException as error:
            log.info("event=deploy_failed pipeline=%s error=%r", record.name, str(error) or type(error).__name__)
            await self._finish(self._tear_down(record))
            raise
        self._cluster.update(record)
        log.info("event=deployed pipeline=%s id=%s", record.name, record.id)
        return self._cluster.info(self._cluster.deployments.find(record.id))

    async def _undeploy(self, pipeline_id: str) -> None:
        operation = self._operations.get(pipeline_id)
        if operation is not None:
            operation.cancel()
            await operation.ended()
        deployment = self._cluster.deployments.get(pipeline_id)
        if deployment is None:
            return
        record = deployment.record
        if record.phase is Phase.UNDEPLOYING:
            return  # somebody else's undeploy is at it
        log.info("event=undeploying pipeline=%s id=%s", record.name, record.id)
        await self._store.save(replace(record, phase=Phase.UNDEPLOYING))
        await self._tear_down(record)

    async def _tear_down(self, record: PipelineRecord) -> None:
        """Unload all stages of a pipeline and forget it.

        What is kept of it says that it is not running: where that cannot be deleted, the next start forgets it.
        """
        self._cluster.update(replace(record, phase=Phase.UNDEPLOYING))
        try:
            await self._rings.unmake(record.id, (*record.stages, *record.next_stages))
            await self._store.delete(record.id)
        except NotReady as error:
            log.warning("event=not_forgotten pipeline=%s id=%s error=%r", record.name, record.id, error.message)
        finally:
            self._cluster.remove(record.id)
            log.info("event=undeployed pipeline=%s id=%s", record.name, record.id)

    async def _finish(self, work: Awaitable[None]) -> None:
        """Do this to its end, even when whoever waits for it is cancelled."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        await asyncio.shield(task)

    @contextlib.contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        began, result = time.monotonic(), "INTERNAL"
        try:
            yield
            result = "OK"
        except asyncio.CancelledError:
            result = "CANCELLED"
            raise
        except EldricError as error:
            result = error.status
            raise
        finally:
            self._metrics.deploys.labels(operation, result).observe(time.monotonic() - began)
