"""The controller's one view of nodes and pipelines, kept in the event loop.

What happens goes in here; the registry and the deployments decide; what they decide is published to those who watch,
answered to workers over their Beat streams, or handed out as chores, which need the network.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eldric import PROTOCOL
from eldric.controller import convert
from eldric.controller.config import ControllerConfig
from eldric.controller.deployments import (
    Change,
    Deployment,
    Deployments,
    Improve,
    Mend,
    Orphan,
    PipelineChanged,
    PipelineRemoved,
    Reload,
    WantedChanged,
)
from eldric.controller.nodes import NodeInfo, NodeState, StageReport
from eldric.controller.pipelines import PipelineRecord
from eldric.controller.registry import Event, Node, NodeChanged, NodeRemoved, Probe, Registry
from eldric.controller.seating import DEFAULT_TRANSPORT, WorkerView
from eldric.controller.watch import Broadcast
from eldric.v1 import heartbeat_pb2, pipeline_pb2, registry_pb2


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody listens at this address any more."""

    address: str


#: What the pure parts ask for and the network does.
Chore = Probe | Orphan | Mend | Reload | Improve | Forget


class Cluster:
    """Nodes and pipelines. All methods but `gone` are immediate; they belong to the event loop."""

    def __init__(self, config: ControllerConfig, perform: Callable[[Chore], None]) -> None:
        """`perform` starts a chore and returns at once."""
        interval_s = config.beat_interval_ms / 1000
        self.registry = Registry(PROTOCOL, interval_s, config.lease_ms / 1000)
        self.deployments = Deployments(self.registry.get, interval_s, config.better_links_s)
        self.node_news: Broadcast[registry_pb2.NodeEvent] = Broadcast("nodes")
        self.pipeline_news: Broadcast[pipeline_pb2.PipelineEvent] = Broadcast("pipelines")
        self._perform = perform
        self._beats: dict[str, set[asyncio.Event]] = {}
        self._gone: dict[str, set[tuple[int, asyncio.Future[str]]]] = {}
        self._published: dict[str, tuple[object, ...]] = {}

    # What nodes do.

    def register(self, info: NodeInfo, *, permanent: bool = False) -> None:
        known = self.registry.get(info.id)
        before = known.info.grpc_address if known is not None else info.grpc_address
        self._apply(self.registry.register(info, time.monotonic(), time.time(), permanent=permanent))
        if before != info.grpc_address:
            self._perform(Forget(before))

    def deregister(self, node_id: str) -> None:
        self._apply(self.registry.deregister(node_id))

    def open_link(self, node_id: str, incarnation: int, wake: asyncio.Event) -> int:
        """A Beat stream begins; `wake` is set when its node should get an answer now."""
        link = self.registry.link_opened(node_id, incarnation)
        self._beats.setdefault(node_id, set()).add(wake)
        return link

    def close_link(self, node_id: str, link: int, wake: asyncio.Event) -> None:
        wakes = self._beats.get(node_id, set())
        wakes.discard(wake)
        if not wakes:
            self._beats.pop(node_id, None)
        self._apply(self.registry.link_closed(node_id, link))

    def beat(self, request: heartbeat_pb2.BeatRequest) -> None:
        events = self.registry.beat(
            request.node_id,
            request.incarnation,
            request.sequence,
            time.monotonic(),
            draining=request.draining,
            stages=convert.reports(request.stages),
            memory_used_bytes=request.memory_used_bytes,
        )
        self._apply(events)
        self._carry_out(self.deployments.beaten(request.node_id))

    def probed(self, probe: Probe, alive: bool | None) -> None:
        self._apply(self.registry.probed(probe.node_id, probe.incarnation, alive, time.monotonic()))

    def tick(self) -> None:
        now = time.monotonic()
        self._apply(self.registry.tick(now))
        self._carry_out(self.deployments.tick(now))

    # What is done with pipelines.

    def add(self, record: PipelineRecord, *, settle_by: float | None = None) -> None:
        self._carry_out(self.deployments.add(record, settle_by=settle_by))

    def update(self, record: PipelineRecord, message: str = "") -> None:
        self._carry_out(self.deployments.update(record, message=message))

    def remove(self, pipeline_id: str) -> None:
        self._carry_out(self.deployments.remove(pipeline_id))

    def note(self, pipeline_id: str, message: str, progress: float) -> None:
        self._carry_out(self.deployments.note(pipeline_id, message, progress))

    def reloaded(self, pipeline_id: str, problem: str = "") -> None:
        """A reload is over; see Deployments.reloaded."""
        self._carry_out(self.deployments.reloaded(pipeline_id, problem))

    def stage_seen(self, node_id: str, report: StageReport) -> None:
        """A worker said this of a stage in answer to a call. Of a pipeline that is gone by now it counts no more."""
        if self.deployments.get(report.key.pipeline_id) is not None:
            self.registry.update_stage(node_id, report)

    def look_again(self, node_id: str) -> None:
        """Settle the state of the pipelines on a node by what `stage_seen` brought."""
        self._carry_out(self.deployments.node_changed(node_id))

    def stages_gone(self, node_id: str, pipeline_id: str, epoch: int) -> None:
        """A worker unloaded its stages of a pipeline, up to that epoch (0: all)."""
        node = self.registry.get(node_id)
        if node is not None:
            keys = [key for key in node.stages if key.pipeline_id == pipeline_id and (not epoch or key.epoch <= epoch)]
            self.registry.drop_stages(node_id, keys)

    # What others ask.

    def nodes(self, kind: str = "") -> list[Node]:
        return [node for node in self.registry if kind in ("", node.info.kind)]

    def info(self, deployment: Deployment) -> pipeline_pb2.PipelineInfo:
        return convert.pipeline_info(deployment, self.registry.get)

    def wanted(self, node_id: str) -> list[heartbeat_pb2.WantedStage]:
        return [convert.wanted_message(wanted) for wanted in self.deployments.wanted(node_id)]

    def worker_views(self, without: str = "") -> list[WorkerView]:
        """The workers as planning sees them; `without`: as if the pipeline of this id took no memory."""
        return [self._view(node, without) for node in self.nodes("worker")]

    async def gone(self, node_id: str, incarnation: int) -> str:
        """Returns why that process is gone, once it is."""
        gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting = incarnation, gone
        self._gone.setdefault(node_id, set()).add(waiting)
        self._tell_gone(node_id)
        try:
            return await gone
        finally:
            self._gone[node_id].discard(waiting)
            if not self._gone[node_id]:
                del self._gone[node_id]

    def _view(self, node: Node, without: str) -> WorkerView:
        resources = node.info.resources
        unusable = {
            NodeState.UP: "",
            NodeState.DRAINING: "is draining",
            NodeState.SUSPECT: f"is suspect: {node.reason}",
            NodeState.LOST: f"is lost: {node.reason}",
        }[node.state]
        if resources is None:
            unusable = unusable or "offers no resources"
        return WorkerView(
            name=node.info.name,
            memory_bytes=resources.memory_bytes if resources else 0,
            used_bytes=self.deployments.committed_bytes(node, without=without),
            unusable=unusable,
            protocol=node.info.protocol,
            transports=(resources.transports if resources else ()) or (DEFAULT_TRANSPORT,),
            host=resources.host if resources else "",
            edge_id=node.info.edge_id,
        )

    def _apply(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Probe):
                self._perform(event)
                continue
            if isinstance(event, NodeRemoved):
                node_id = event.node.id
                self.node_news.publish(registry_pb2.NodeEvent(node=convert.node_message(event.node), removed=True))
                self._perform(Forget(event.node.info.grpc_address))
            else:
                node_id = event.node_id
                self._publish_node(event)
            self._tell_gone(node_id)
            self._carry_out(self.deployments.node_changed(node_id))

    def _publish_node(self, event: NodeChanged) -> None:
        node = self.registry.get(event.node_id)
        if node is not None:
            self.node_news.publish(registry_pb2.NodeEvent(node=convert.node_message(node)))

    def _carry_out(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change:
                case PipelineChanged():
                    self._publish_pipeline(change.pipeline_id)
                case PipelineRemoved():
                    self._published.pop(change.record.id, None)
                    removed = convert.bare_info(change.record)
                    self.pipeline_news.publish(pipeline_pb2.PipelineEvent(pipeline=removed, removed=True))
                case WantedChanged():
                    for wake in self._beats.get(change.node_id, ()):
                        wake.set()
                case Orphan() | Mend() | Reload() | Improve():
                    self._perform(change)

    def _publish_pipeline(self, pipeline_id: str) -> None:
        deployment = self.deployments.get(pipeline_id)
        if deployment is None:
            return
        info = self.info(deployment)
        shown = info.state, info.epoch, info.head_address, info.message, round(info.progress, 2)
        if self._published.get(pipeline_id) != shown:
            self._published[pipeline_id] = shown
            self.pipeline_news.publish(pipeline_pb2.PipelineEvent(pipeline=info))

    def _tell_gone(self, node_id: str) -> None:
        """Ends what waits for a process that is lost, left or was replaced."""
        node = self.registry.get(node_id)
        for incarnation, gone in self._gone.get(node_id, ()):
            if gone.done():
                continue
            if node is None:
                gone.set_result("it left the cluster")
            elif node.info.incarnation != incarnation:
                gone.set_result("it restarted")
            elif not node.is_alive:
                gone.set_result(f"it is lost: {node.reason}")
