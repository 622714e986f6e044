"""Moves a pipeline to the plan that is best now: loads beside, switches, unloads. Or loads again what was lost."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.deployments import PipelineState
from eldric.controller.operation import Operation
from eldric.controller.pipelines import PipelineRecord, StageRecord
from eldric.controller.planner import Plan
from eldric.controller.planning import Planning
from eldric.controller.progress import Progress
from eldric.controller.ring import RingMaker
from eldric.controller.state import Store
from eldric.errors import NotEnoughMemory, NotReady
from eldric.v1 import pipeline_pb2

log = logging.getLogger(__name__)

#: What sequences are told that run when their stages are unloaded.
MOVED = "the pipeline was rebalanced and its old stages are gone: send the request again"
RELOADED = "the pipeline is being loaded again: send the request again soon"

NOTHING_TO_CHANGE = "nothing to change: the stages are where they would be planned now"


class Rebalance:
    """One attempt after another; see `deployer` for what is kept when."""

    def __init__(self, cluster: Cluster, store: Store, planning: Planning, rings: RingMaker) -> None:
        self._cluster = cluster
        self._store = store
        self._planning = planning
        self._rings = rings

    async def run(self, record: PipelineRecord, operation: Operation) -> pipeline_pb2.PipelineInfo:
        """Raises what planning and loading raise; then the pipeline is as it was."""
        prepared = await self._planning.prepare(record.request)
        if prepared.source.header_sha256 != record.source.header_sha256:
            raise NotReady(f"{record.model!r} in the store is another file than was deployed: undeploy, deploy again")
        made = self._planning.plan_again(prepared, record)
        operation.emit(pipeline_pb2.DeployEvent(plan=convert.plan_message(made, record.model)))
        now = self._cluster.deployments.find(record.id)
        works = now.state is PipelineState.READY or (now.closing and not now.degraded)
        if works and made.layout == _layout(record.stages):
            info = self._info(record)
            info.message = NOTHING_TO_CHANGE
            return info
        if works:
            self._check_beside(made, record.name)
        else:
            await self._rings.unmake(record.id, record.stages, record.epoch, MOVED)  # nothing runs there: make room
        moved = replace(
            record,
            epoch=record.epoch + 1,
            stages=self._planning.stages(made),
            options=convert.options_message(made.options),
            source=prepared.source,
            transport=made.transport,
        )
        return await self._move(record, moved, operation, "rebalancing")

    async def reload(self, record: PipelineRecord, operation: Operation) -> pipeline_pb2.PipelineInfo:
        """Load the same layers on what the same workers are now, one epoch on. Raises what loading raises."""
        stages = tuple(self._planning.renewed(stage) for stage in record.stages)
        source = await self._planning.located(record.source)
        moved = replace(record, epoch=record.epoch + 1, stages=stages, source=source)
        await self._rings.unmake(record.id, moved.stages, reason=RELOADED)  # whatever an attempt before left there, too
        return await self._move(record, moved, operation, "loading again")

    async def _move(
        self, record: PipelineRecord, moved: PipelineRecord, operation: Operation, doing: str
    ) -> pipeline_pb2.PipelineInfo:
        stages = moved.stages
        moving = replace(record, next_stages=stages)
        self._cluster.update(moving, doing)
        try:
            await self._store.save(moving)
            progress = Progress(
                stages,
                operation.emit_stage,
                lambda line, share: self._cluster.note(record.id, f"{doing}: {line}", share),
            )
            await self._rings.make(moved, stages, moved.epoch, progress)
            await self._store.save(moved)
        except BaseException:
            self._cluster.update(record)  # the answers to their beats no longer name the next stages: they unload
            await self._store.save(record)
            raise
        self._cluster.update(moved)
        log.info("event=moved pipeline=%s epoch=%d after=%r", record.name, moved.epoch, doing)
        await self._rings.unmake(record.id, record.stages, record.epoch, MOVED)
        return self._info(moved)

    def _check_beside(self, made: Plan, name: str) -> None:
        """Raises NotEnoughMemory when the new stages have no room beside the old ones."""
        views = {view.name: view for view in self._cluster.worker_views()}
        for worker in {stage.worker for stage in made.stages}:
            needed = sum(stage.needed_bytes for stage in made.stages if stage.worker == worker)
            free = views[worker].available_bytes
            if needed > free:
                raise NotEnoughMemory(
                    f"the new stages of {name!r} do not fit beside those that run: {worker} needs {needed} bytes and "
                    f"has {free}, {needed - free} bytes are missing; undeploy and deploy again to move it"
                )

    def _info(self, record: PipelineRecord) -> pipeline_pb2.PipelineInfo:
        return self._cluster.info(self._cluster.deployments.find(record.id))


def _layout(stages: Sequence[StageRecord]) -> tuple[tuple[str, int, int], ...]:
    return tuple((stage.worker, stage.start, stage.end) for stage in stages)
