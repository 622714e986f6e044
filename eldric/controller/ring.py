"""Makes rings of stages on workers, mends and unmakes them: the calls in the right order, the first cause named."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.linking import Linking, Wired, named, wired
from eldric.controller.links import better_choices, far_stages, ring_choices
from eldric.controller.nodes import Endpoint, StageKey, StageReport, StageState
from eldric.controller.pipelines import PipelineRecord, StageRecord
from eldric.controller.progress import Progress
from eldric.controller.registry import Node
from eldric.controller.seating import WorkerView
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

        views = self._views(stages)
        choices, far = ring_choices(views, record.transport), far_stages(views)

        async def load(stage: StageRecord) -> Wired:
            key = StageKey(record.id, epoch, stage.index)
            transport = choices[stage.index - 1].scheme if choices else ""
            request = convert.load_request(record, stage, key, len(stages), transport, far[stage.index])
            return await self._load(stage, key, request, progress)

        have = await self._on_each(stages, load)
        await self._connect(Linking(record.id, epoch, tuple(stages), tuple(have), choices))
        for stage in stages:
            progress.report(stage, "connected")

    async def mend(self, record: PipelineRecord) -> None:
        """Connect a ring again whose stages are all there, in a new round. Raises NotReady when one is not."""
        await self._connect(self._present(record))

    async def improve(self, record: PipelineRecord, may_switch: Callable[[], bool]) -> bool:
        """Try better transports for the links that have not the best, and go over to those that work by now.

        Nothing that runs is lost: the other links are made beside those in use, and the head goes over to them only
        while it has no sequence. may_switch: whether the ring is still wanted as it is. Returns whether it did.
        """
        present = self._present(record)
        better = better_choices(self._views(record.stages), record.transport, present.schemes)
        if all(choice.scheme == scheme for choice, scheme in zip(better, present.schemes, strict=True)):
            return False
        linking = present.beside(better)
        try:
            linking = await self._connect_beside(linking)
            if linking.schemes == present.schemes or not may_switch():
                return False
            return await self._switch(record, linking.explained(present))
        finally:
            await self._drop_beside(linking)

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

    def _views(self, stages: Sequence[StageRecord]) -> list[WorkerView]:
        """The workers of these stages. Raises Unavailable when one is gone."""
        views = {view.name: view for view in self._cluster.worker_views()}
        missing = [stage for stage in stages if stage.worker not in views]
        if missing:
            raise named(missing[0], Unavailable("it left the cluster"))
        return [views[stage.worker] for stage in stages]

    def _present(self, record: PipelineRecord) -> Linking:
        """A ring whose stages are all there, with the links that it has, for its next round. Raises NotReady."""
        ring, rounds = [], []
        choices = list(ring_choices(self._views(record.stages), record.transport))
        for stage in record.stages:
            report = self._node(stage).stages.get(record.key(stage))
            have = wired(report) if report is not None else None
            if report is None or have is None:
                raise NotReady(f"stage {stage.index} on {stage.worker} is not there")
            ring.append(have)
            rounds.append(report.round)
            if report.link is not None and choices:
                choices[stage.index] = choices[stage.index].resumed(report.link.transport, report.link.fallback)
        return Linking(record.id, record.epoch, record.stages, tuple(ring), tuple(choices), max(rounds) + 1)

    async def _connect(self, linking: Linking) -> None:
        """Tell every stage its neighbours and wait until all serve. A link that fails falls back, in a next round."""
        while True:
            linking = await self._open_links(linking)
            failed = await self._tell(linking)
            if not failed:
                break
            linking = linking.fell_back(failed).next_round()
        await self._on_each(linking.stages, lambda stage: self._serving(stage, linking.key(stage)))

    async def _open_links(self, linking: Linking) -> Linking:
        """Let every stage receive and send by its links' schemes, or by what those fall back to."""
        while requests := linking.open_requests():
            linking, failed = linking.opened(await self._ask(linking, requests))
            if not failed:
                break
            linking = linking.fell_back(failed)
        return linking

    async def _ask(
        self, linking: Linking, requests: Mapping[int, stage_pb2.OpenLinksRequest]
    ) -> dict[int, stage_pb2.OpenLinksResponse]:
        stages = [linking.stages[index] for index in requests]

        async def ask(stage: StageRecord) -> stage_pb2.OpenLinksResponse:
            return await self._workers.open_links(self._node(stage), requests[stage.index])

        return dict(zip(requests, await self._on_each(stages, ask), strict=True))

    async def _connect_beside(self, linking: Linking) -> Linking:
        """Make links beside those in use. Those that fail fall back, at last to what they are in use."""
        while True:
            linking = await self._open_links(linking)
            failed = await self._tell(linking, stage_pb2.BESIDE)
            if not failed:
                return linking
            linking = linking.fell_back(failed)

    async def _switch(self, record: PipelineRecord, linking: Linking) -> bool:
        """Let all stages go over to the links beside. False: they did not, the head having sequences for one.

        A ring of which some went over and some did not is connected anew, which ends what runs.
        """

        async def switch(stage: StageRecord) -> bool:
            return await self._workers.switch(self._node(stage), linking.connect_request(stage, stage_pb2.SWITCH))

        head, *others = linking.stages
        try:
            if not all(await self._on_each([head], switch)):
                return False
            await self._on_each(others, switch)
            await self._on_each(linking.stages, lambda stage: self._serving(stage, linking.key(stage)))
        except EldricError as error:
            log.warning("event=links_not_improved pipeline=%s error=%r", linking.pipeline_id, error.message)
            await self._drop_beside(linking)
            await self._on_each(linking.stages, lambda stage: self._look(stage, linking.key(stage)))
            await self.mend(record)
            return False
        log.info("event=links_improved pipeline=%s links=%s", linking.pipeline_id, ",".join(linking.schemes))
        return True

    async def _drop_beside(self, linking: Linking) -> None:
        """Close what is beside the links in use. A stage that cannot be told does so when it is unloaded."""
        for stage in linking.stages:
            with contextlib.suppress(EldricError):
                await self._workers.open_links(self._node(stage), linking.drop_request(stage))

    async def _tell(
        self, linking: Linking, phase: "stage_pb2.ConnectPhase.ValueType" = stage_pb2.NOW
    ) -> dict[int, str]:
        """Returns the links that fail: by sending stage, and why."""

        async def tell(stage: StageRecord) -> str:
            return await self._workers.connect(self._node(stage), linking.connect_request(stage, phase))

        problems = await self._on_each(linking.stages, tell)
        return {index: problem for index, problem in enumerate(problems) if problem}

    async def _load(
        self, stage: StageRecord, key: StageKey, request: stage_pb2.LoadRequest, progress: Progress
    ) -> Wired:
        def advance(event: stage_pb2.LoadProgress) -> None:
            progress.report(stage, event.phase, event.done_bytes, event.total_bytes)

        loaded = await self._workers.load(self._node(stage), request, advance)
        report = convert.loaded_report(key, loaded)
        have = wired(report)
        if have is None and request.stage_count > 1:
            raise Unavailable("it gave no tensor endpoint")
        self._cluster.stage_seen(stage.node_id, report)
        progress.report(stage, "loaded", stage.weights_bytes, stage.weights_bytes)
        return have or Wired(Endpoint("", "", ""), "", "")

    async def _serving(self, stage: StageRecord, key: StageKey) -> None:
        """Returns when a stage serves. Raises Unavailable when it breaks or is gone, DeadlineExceeded."""
        pause_s = _FIRST_PAUSE_S
        try:
            async with asyncio.timeout(SERVING_S):
                while True:
                    report = await self._look(stage, key)
                    if report is None or report.state is StageState.UNLOADING:
                        raise Unavailable("it was unloaded meanwhile")
                    if report.state is StageState.BROKEN:
                        raise Unavailable(report.message or "it cannot reach its neighbours")
                    if report.state is StageState.SERVING:
                        return
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            raise DeadlineExceeded(f"it does not serve within {SERVING_S:g} s") from None

    async def _look(self, stage: StageRecord, key: StageKey) -> StageReport | None:
        """What a worker says of a stage now; None: it has none."""
        statuses = await self._workers.statuses(self._node(stage), key.pipeline_id)
        report = next((each for each in convert.reports(statuses) if each.key == key), None)
        if report is not None:
            self._cluster.stage_seen(stage.node_id, report)
        return report

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
                raise named(stage, error) from error

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
        raise named(stage, Unavailable(await self._cluster.gone(stage.node_id, stage.incarnation)))

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
