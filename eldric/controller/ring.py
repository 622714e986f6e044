"""Makes rings of stages on workers, mends and unmakes them: the calls in the right order, the first cause named."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.nodes import Endpoint, StageKey, StageState
from eldric.controller.pipelines import PipelineRecord, StageRecord
from eldric.controller.progress import Progress
from eldric.controller.registry import Node
from eldric.controller.workers import Workers
from eldric.errors import DeadlineExceeded, EldricError, NotReady, Unavailable
from eldric.v1 import stage_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[StageRecord], Coroutine[Any, Any, T]]

#: How long a stage may take from being told its neighbours to serving, and the pauses between two looks, in seconds.
SERVING_S = 15.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1


class RingMaker:
    """Works on the stages of one ring at once, and fails with the first of their errors, named by stage and worker."""

    def __init__(self, cluster: Cluster, workers: Workers) -> None:
        self._cluster = cluster
        self._workers = workers

    async def make(self, record: PipelineRecord, stages: Sequence[StageRecord], epoch: int, progress: Progress) -> None:
        """Load all stages, connect them, wait until all serve. Undoes nothing when it fails or is cancelled."""

        async def load(stage: StageRecord) -> Endpoint:
            return await self._load(record, stage, StageKey(record.id, epoch, stage.index), len(stages), progress)

        endpoints = await self._on_each(stages, load)
        await self.connect(record.id, stages, epoch, endpoints)
        for stage in stages:
            progress.report(stage, "connected")

    async def connect(
        self,
        pipeline_id: str,
        stages: Sequence[StageRecord],
        epoch: int,
        endpoints: Sequence[Endpoint],
        round: int = 0,
    ) -> None:
        """Tell every stage its neighbours and wait until all serve.

        `endpoints`: of the stages, in order. `round`: how often they were connected before.
        """
        workers = [stage.worker for stage in stages]

        async def connect(stage: StageRecord) -> None:
            request = connect_request(pipeline_id, epoch, stage.index, endpoints)
            request.workers.extend(workers)
            request.round = round
            await self._workers.connect(self._node(stage), request)
            await self._serving(stage, StageKey(pipeline_id, epoch, stage.index))

        await self._on_each(stages, connect)

    async def mend(self, record: PipelineRecord) -> None:
        """Connect a ring again whose stages are all there, in a new round. Raises NotReady when one is not."""
        endpoints, rounds = [], []
        for stage in record.stages:
            report = self._node(stage).stages.get(record.key(stage))
            if report is None or report.endpoint is None:
                raise NotReady(f"stage {stage.index} on {stage.worker} is not there")
            endpoints.append(report.endpoint)
            rounds.append(report.round)
        await self.connect(record.id, record.stages, record.epoch, endpoints, max(rounds) + 1)

    async def unmake(self, pipeline_id: str, stages: Sequence[StageRecord], epoch: int = 0, reason: str = "") -> None:
        """Unload a pipeline's stages, the head first, so that it ends its sequences in good order. Never raises.

        Workers that are lost hold nothing any more; one that cannot be reached unloads by itself once its answers no
        longer name the stage. `epoch`: only stages of at most this epoch; 0: all. `reason`: what sequences are told.
        """
        nodes: dict[str, StageRecord] = {}
        for stage in stages:
            nodes.setdefault(stage.node_id, stage)
        head, *others = nodes.values()
        await self._unload(pipeline_id, head, epoch, reason)
        await asyncio.gather(*(self._unload(pipeline_id, stage, epoch, reason) for stage in others))

    async def _load(
        self, record: PipelineRecord, stage: StageRecord, key: StageKey, count: int, progress: Progress
    ) -> Endpoint:
        def advance(event: stage_pb2.LoadProgress) -> None:
            progress.report(stage, event.phase, event.done_bytes, event.total_bytes)

        request = convert.load_request(record, stage, key, count)
        loaded = await self._workers.load(self._node(stage), request, advance)
        report = convert.loaded_report(key, loaded)
        if report.endpoint is None and count > 1:
            raise Unavailable("it gave no tensor endpoint")
        self._cluster.stage_seen(stage.node_id, report)
        progress.report(stage, "loaded", stage.weights_bytes, stage.weights_bytes)
        return report.endpoint or Endpoint("", "", "")

    async def _serving(self, stage: StageRecord, key: StageKey) -> None:
        """Returns when a stage serves. Raises Unavailable when it breaks or is gone, DeadlineExceeded."""
        pause_s = _FIRST_PAUSE_S
        try:
            async with asyncio.timeout(SERVING_S):
                while True:
                    statuses = await self._workers.statuses(self._node(stage), key.pipeline_id)
                    report = next((each for each in convert.reports(statuses) if each.key == key), None)
                    if report is None or report.state is StageState.UNLOADING:
                        raise Unavailable("it was unloaded meanwhile")
                    if report.state is StageState.BROKEN:
                        raise Unavailable(report.message or "it cannot reach its neighbours")
                    self._cluster.stage_seen(stage.node_id, report)
                    if report.state is StageState.SERVING:
                        return
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            raise DeadlineExceeded(f"it does not serve within {SERVING_S:g} s") from None

    async def _unload(self, pipeline_id: str, stage: StageRecord, epoch: int, reason: str) -> None:
        async def unload(stage: StageRecord) -> None:
            await self._workers.unload(self._node(stage), pipeline_id, epoch, reason=reason)

        try:
            await self._on_each([stage], unload)
        except EldricError as error:
            log.info("event=unload_failed pipeline=%s error=%r", pipeline_id, error.message)
        else:
            self._cluster.stages_gone(stage.node_id, pipeline_id, epoch)

    async def _on_each(self, stages: Sequence[StageRecord], work: Work[T]) -> list[T]:
        """The results of `work` on every stage at once.

        The first error ends the others, and so does the loss of a worker, even of one that has done its part.
        """

        async def on(stage: StageRecord) -> T:
            try:
                self._node(stage)
                return await work(stage)
            except EldricError as error:
                raise _named(stage, error) from error

        try:
            async with asyncio.TaskGroup() as group:
                guards = [group.create_task(self._guard(stage)) for stage in stages]
                tasks = [group.create_task(on(stage)) for stage in stages]
                await asyncio.wait(tasks)
                for guard in guards:
                    guard.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _guard(self, stage: StageRecord) -> None:
        """Raises Unavailable when the process of a stage is gone."""
        raise _named(stage, Unavailable(await self._cluster.gone(stage.node_id, stage.incarnation)))

    def _node(self, stage: StageRecord) -> Node:
        """The process that a stage belongs to. Raises Unavailable when it is gone."""
        node = self._cluster.registry.get(stage.node_id)
        if node is None:
            raise Unavailable("it left the cluster")
        if node.info.incarnation != stage.incarnation:
            raise Unavailable("it restarted")
        if not node.is_alive:
            raise Unavailable(f"it is lost: {node.reason}")
        return node


def _named(stage: StageRecord, error: EldricError) -> EldricError:
    return type(error)(f"stage {stage.index} on {stage.worker}: {error.message}")


def connect_request(
    pipeline_id: str, epoch: int, index: int, endpoints: Sequence[Endpoint]
) -> stage_pb2.ConnectRequest:
    """What a stage is told of its neighbours; the ring closes from the tail to the head. One stage has no neighbour."""
    request = stage_pb2.ConnectRequest(pipeline_id=pipeline_id, index=index, epoch=epoch)
    if len(endpoints) > 1:
        after, before = (index + 1) % len(endpoints), (index - 1) % len(endpoints)
        request.next.CopyFrom(convert.endpoint_message(endpoints[after]))
        request.next_index = after
        if endpoints[before].public_key:
            request.allowed_keys.append(endpoints[before].public_key)
    return request
