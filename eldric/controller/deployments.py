"""All pipelines, and what follows for them from what the nodes report. Pure: no clock, no socket.

Every method returns changes for somebody else to carry out: news for those who watch, answers to push to workers,
stages that nobody wants, rings to connect again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from eldric.controller.nodes import NodeState, StageKey, StageState
from eldric.controller.pipelines import Condition, Phase, PipelineRecord, StageRecord, Verdict, is_present, judge
from eldric.controller.registry import Node
from eldric.controller.reloads import Reloads
from eldric.controller.trials import Trials
from eldric.errors import AlreadyExists, NotFound
from eldric.nearest import known_names

#: Beats between two attempts to unload a stage that nobody wants.
ORPHAN_BEATS = 5
#: Longest wait between two attempts to connect a broken ring again, in seconds.
MAX_MEND_S = 30.0


#: Conditions of a stage without which its pipeline cannot generate.
_BAD = (Condition.MISSING, Condition.ABSENT, Condition.BROKEN)


class PipelineState(Enum):
    DEPLOYING = "deploying"
    READY = "ready"
    DEGRADED = "degraded"
    UNDEPLOYING = "undeploying"


@dataclass(frozen=True, slots=True)
class PipelineChanged:
    """Its state, epoch, head or message is another."""

    pipeline_id: str


@dataclass(frozen=True, slots=True)
class PipelineRemoved:
    record: PipelineRecord


@dataclass(frozen=True, slots=True)
class WantedChanged:
    """What this worker should hold, or whether it should serve, is another: answer it without waiting for its beat."""

    node_id: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """A worker holds a stage that no pipeline wants."""

    node_id: str
    key: StageKey


@dataclass(frozen=True, slots=True)
class Mend:
    """All stages of a broken ring are there: connect them again."""

    pipeline_id: str


@dataclass(frozen=True, slots=True)
class Reload:
    """Stages are gone and all their workers are there: load the pipeline again, and say with `reloaded` how it went."""

    pipeline_id: str


@dataclass(frozen=True, slots=True)
class Improve:
    """Nothing runs on a pipeline: see whether better links can be had, and say with `improved` how it went."""

    pipeline_id: str


Change = PipelineChanged | PipelineRemoved | WantedChanged | Orphan | Mend | Reload | Improve


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stage that should exist; `degraded`: its pipeline cannot generate; `closing`: it takes nothing new. And why."""

    key: StageKey
    degraded: bool
    closing: bool = False
    reason: str = ""


@dataclass(slots=True)
class Deployment:
    """One pipeline: what is kept of it, and how it is now."""

    record: PipelineRecord
    reloads: Reloads
    trials: Trials
    state: PipelineState = PipelineState.DEPLOYING
    message: str = ""
    progress: float = 0.0
    verdicts: tuple[Verdict, ...] = ()
    absent: dict[int, int] = field(default_factory=dict)  # beats in a row without the stage of that index
    settle_by: float | None = None  # until then stages may be unheard of: the controller has just started
    cause: str = ""  # why it is degraded or closing
    degraded: bool = False  # as the workers were told
    closing: bool = False  # so too
    mend_at: float | None = None
    mend_delay_s: float = 0.0
    mending_until: float | None = None


class Deployments:
    """The pipelines of a cluster."""

    def __init__(
        self, node: Callable[[str], Node | None], beat_interval_s: float, better_links_s: float = math.inf
    ) -> None:
        """`node` finds a registered node by id. better_links_s: see ControllerConfig."""
        self._node = node
        self._interval_s = beat_interval_s
        self._better_links_s = better_links_s
        self._all: dict[str, Deployment] = {}
        self._by_node: dict[str, list[Deployment]] = {}
        self._orphans: dict[str, dict[StageKey, int]] = {}

    def __iter__(self) -> Iterator[Deployment]:
        return iter(self._all.values())

    def find(self, name: str) -> Deployment:
        """By name or id. Raises NotFound."""
        for deployment in self:
            if name in (deployment.record.name, deployment.record.id):
                return deployment
        names = sorted(deployment.record.name for deployment in self)
        raise NotFound(f"there is no pipeline {name!r}; {known_names(name, names)}")

    def get(self, pipeline_id: str) -> Deployment | None:
        return self._all.get(pipeline_id)

    def check_free(self, name: str) -> None:
        """Raises AlreadyExists when there is a pipeline of that name."""
        for other in self:
            if other.record.name == name:
                raise AlreadyExists(
                    f"there is a pipeline {name!r} ({other.state.value}): undeploy it first (`eldric-cli undeploy "
                    f"{name}`), or give the new one another name"
                )

    def add(self, record: PipelineRecord, *, settle_by: float | None = None) -> list[Change]:
        """A new pipeline, or one that was kept over a restart (`settle_by`). Raises AlreadyExists."""
        self.check_free(record.name)
        deployment = self._all[record.id] = Deployment(
            record, Reloads(self._interval_s), Trials(self._better_links_s), settle_by=settle_by
        )
        self._index()
        return [PipelineChanged(record.id), *self._evaluate(deployment), *_workers(record)]

    def update(self, record: PipelineRecord, *, message: str = "") -> list[Change]:
        """The pipeline goes on to another phase, epoch or set of stages."""
        deployment = self._all[record.id]
        before, deployment.record, deployment.message = deployment.record, record, message
        self._index()
        if record.phase is Phase.RUNNING and not record.next_stages:
            deployment.progress = 1.0
        if record.epoch != before.epoch or record.phase is not before.phase:
            deployment.absent, deployment.mend_at, deployment.mending_until = {}, None, None
            deployment.reloads.succeeded()
        changes = [PipelineChanged(record.id), *self._evaluate(deployment), *_workers(before), *_workers(record)]
        return list(dict.fromkeys(changes))

    def note(self, pipeline_id: str, message: str, progress: float) -> list[Change]:
        """How far a deploy or a rebalance is."""
        deployment = self._all.get(pipeline_id)
        if deployment is None:
            return []
        deployment.message, deployment.progress = message, progress
        return [PipelineChanged(pipeline_id)]

    def remove(self, pipeline_id: str) -> list[Change]:
        record = self._all.pop(pipeline_id).record
        self._index()
        return [PipelineRemoved(record), *_workers(record)]

    def beaten(self, node_id: str) -> list[Change]:
        """A worker's beat came, with its stages."""
        node = self._node(node_id)
        if node is None:
            return []
        changes: list[Change] = []
        for deployment in self._by_node.get(node_id, ()):
            for stage in deployment.record.stages:
                if stage.node_id == node_id and stage.incarnation == node.info.incarnation:
                    present = is_present(node.stages.get(deployment.record.key(stage)))
                    deployment.absent[stage.index] = 0 if present else deployment.absent.get(stage.index, 0) + 1
            changes += self._evaluate(deployment)
        return changes + self._find_orphans(node)

    def node_changed(self, node_id: str) -> list[Change]:
        """A worker's state is another, or it left."""
        if self._node(node_id) is None:
            self._orphans.pop(node_id, None)
        return [change for each in self._by_node.get(node_id, ()) for change in self._evaluate(each)]

    def tick(self, now: float) -> list[Change]:
        """Time passed."""
        changes: list[Change] = []
        for deployment in self:
            if deployment.settle_by is not None and now >= deployment.settle_by:
                deployment.settle_by = None
                changes += self._evaluate(deployment)
            changes += [*self._mend(deployment, now), *self._reload(deployment, now)]
            if deployment.trials.take(now, ready=self.may_improve(deployment.record), idle=self._is_idle(deployment)):
                changes.append(Improve(deployment.record.id))
        return changes

    def may_improve(self, record: PipelineRecord) -> bool:
        """Whether a ring is as it was, and well: its links may be replaced."""
        now = self._all.get(record.id)
        if now is None or now.record is not record or record.next_stages or len(record.stages) < 2:
            return False
        return now.state is PipelineState.READY

    def improved(self, pipeline_id: str, *, better: bool) -> None:
        """What was asked for by Improve is over."""
        deployment = self._all.get(pipeline_id)
        if deployment is not None:
            deployment.trials.ended(better=better)

    def reloaded(self, pipeline_id: str, problem: str = "") -> list[Change]:
        """What was asked for by Reload is over: it is done, it failed, or it could not begin (no problem)."""
        deployment = self._all.get(pipeline_id)
        if deployment is None or not deployment.reloads.running:
            return []
        deployment.reloads.ended(problem)
        return self._evaluate(deployment)

    def wanted(self, node_id: str) -> list[Wanted]:
        """The stages that a worker should hold."""
        return [
            _wanted(deployment, key)
            for deployment in self._by_node.get(node_id, ())
            for key, stage in deployment.record.wanted
            if stage.node_id == node_id
        ]

    def committed_bytes(self, node: Node, *, without: str = "") -> int:
        """Memory of a worker that is taken or promised, in bytes; `without`: but for the pipeline of this id."""
        total, known = 0, set()
        for deployment in self._by_node.get(node.id, ()):
            record = deployment.record
            for key, stage in record.known:
                if stage.node_id != node.id or stage.incarnation != node.info.incarnation:
                    continue
                known.add(key)
                is_gone = deployment.reloads.running and key == record.key(stage) and key not in node.stages
                if record.id != without and not is_gone:
                    total += _held_bytes(node, key, stage)
        return total + sum(report.memory.total for key, report in node.stages.items() if key not in known)

    def _index(self) -> None:
        """Which pipelines a node is part of: every beat asks."""
        self._by_node = {}
        for deployment in self:
            for node_id in _nodes_of(deployment.record):
                self._by_node.setdefault(node_id, []).append(deployment)

    def _evaluate(self, deployment: Deployment) -> list[Change]:
        """Look at every stage and settle the pipeline's state."""
        record, before = deployment.record, (deployment.state, deployment.message)
        told = deployment.degraded, deployment.closing
        deployment.verdicts = tuple(self._judge(deployment, stage) for stage in record.stages)
        if record.phase is Phase.RUNNING:
            self._settle(deployment)
        else:
            deployment.state = PipelineState[record.phase.name]
        conditions = {verdict.condition for verdict in deployment.verdicts}
        is_being_repaired = deployment.mending_until is not None or deployment.reloads.running
        deployment.degraded = not conditions.isdisjoint(_BAD) and not is_being_repaired
        deployment.closing = Condition.CLOSING in conditions
        changes: list[Change] = []
        if (deployment.state, deployment.message) != before:
            changes.append(PipelineChanged(record.id))
        if (deployment.degraded, deployment.closing) != told:
            changes += _workers(record)
        return changes

    def _judge(self, deployment: Deployment, stage: StageRecord) -> Verdict:
        """How a stage is; of a pipeline that does not run nothing is expected."""
        record = deployment.record
        if record.phase is not Phase.RUNNING:
            return Verdict(Condition.WAITING)
        node, absent = self._node(stage.node_id), deployment.absent.get(stage.index, 0)
        return judge(record, stage, node, absent, settled=deployment.settle_by is None)

    def _settle(self, deployment: Deployment) -> None:
        verdicts = deployment.verdicts
        bad = [each for each in verdicts if each.condition in _BAD]
        waiting = [each for each in verdicts if each.condition is Condition.WAITING]
        closing = [each.reason for each in verdicts if each.condition is Condition.CLOSING]
        deployment.cause = _cause(deployment.cause, bad) or "; ".join(closing)
        if deployment.reloads.running:
            deployment.state = PipelineState.DEPLOYING  # its message is what the reload notes
        elif bad and not (deployment.settle_by is not None and self._will_reload(deployment)):
            deployment.state = PipelineState.DEGRADED
            deployment.message = "; ".join(filter(None, (deployment.cause, deployment.reloads.story)))
        elif bad or waiting:
            deployment.state = PipelineState.DEPLOYING
            reasons = dict.fromkeys(each.reason for each in (*bad, *waiting))
            deployment.message = f"the controller restarted: {', '.join(reasons)}"
            deployment.progress = 1 - len([*bad, *waiting]) / len(verdicts)
        elif closing:
            deployment.state, deployment.message = PipelineState.DEGRADED, deployment.cause
        else:
            if deployment.state is not PipelineState.READY:
                deployment.message, deployment.progress = "", 1.0
            deployment.state, deployment.settle_by = PipelineState.READY, None
            deployment.mend_at = deployment.mending_until = None
            deployment.mend_delay_s = 0.0
            deployment.reloads.succeeded()

    def _mend(self, deployment: Deployment, now: float) -> list[Change]:
        """Connect a ring again whose stages are all there, first after a beat interval, then ever more rarely."""
        if deployment.mending_until is not None:
            if now < deployment.mending_until:
                return []
            deployment.mending_until = None
            return self._evaluate(deployment)
        conditions = {verdict.condition for verdict in deployment.verdicts}
        if deployment.state is not PipelineState.DEGRADED or not conditions <= {Condition.SERVING, Condition.BROKEN}:
            deployment.mend_at = None
            return []
        if deployment.mend_at is None:
            deployment.mend_delay_s = min(MAX_MEND_S, 2 * deployment.mend_delay_s or self._interval_s)
            deployment.mend_at = now + deployment.mend_delay_s
        if now < deployment.mend_at:
            return []
        deployment.mend_at, deployment.mending_until = None, now + 2 * self._interval_s
        return [*self._evaluate(deployment), Mend(deployment.record.id)]

    def _reload(self, deployment: Deployment, now: float) -> list[Change]:
        """Load a pipeline again whose stages are gone, once all its workers are there and do nothing else for it."""
        record = deployment.record
        if record.phase is not Phase.RUNNING or record.next_stages or not self._will_reload(deployment):
            return []
        nodes = [self._node(stage.node_id) for stage in record.stages]
        present = [node for node in nodes if node is not None and node.state is NodeState.UP]
        if len(present) < len(nodes):
            return []
        if not deployment.reloads.take(now, tuple(node.info.incarnation for node in present)):
            return []
        deployment.message, deployment.progress = f"loading again: {deployment.cause}", 0.0
        return [*self._evaluate(deployment), PipelineChanged(record.id), Reload(record.id)]

    def _is_idle(self, deployment: Deployment) -> bool:
        """Whether no sequence runs or waits, as the head said last."""
        head = deployment.record.stages[0]
        node = self._node(head.node_id)
        report = node.stages.get(deployment.record.key(head)) if node is not None else None
        return report is not None and not report.slots_used and not report.queued

    def _will_reload(self, deployment: Deployment) -> bool:
        """Whether stages are missing whose workers are there, or still expected."""
        verdicts = zip(deployment.record.stages, deployment.verdicts, strict=True)
        missing = [stage for stage, verdict in verdicts if verdict.condition in (Condition.MISSING, Condition.ABSENT)]
        return bool(missing) and all(self._node(stage.node_id) is not None for stage in missing)

    def _find_orphans(self, node: Node) -> list[Change]:
        pipelines = self._by_node.get(node.id, ())
        known = {key for each in pipelines for key, stage in each.record.known if stage.node_id == node.id}
        seen = self._orphans.get(node.id, {})
        now = {key: seen.get(key, -1) + 1 for key in node.stages if key not in known}
        self._orphans[node.id] = now
        return [
            Orphan(node.id, key)
            for key, beats in now.items()
            if beats % ORPHAN_BEATS == 0 and node.stages[key].state is not StageState.UNLOADING
        ]


def _wanted(deployment: Deployment, key: StageKey) -> Wanted:
    if key.epoch != deployment.record.epoch or not (deployment.degraded or deployment.closing):
        return Wanted(key, degraded=False)  # the stages that replace the others are not concerned
    return Wanted(key, deployment.degraded, deployment.closing, deployment.cause)


def _cause(before: str, bad: list[Verdict]) -> str:
    """Why a pipeline is degraded: what is missing, or the stage that broke first: the others break for want of it."""
    if not bad:
        return ""
    for condition in (Condition.MISSING, Condition.ABSENT):
        missing = [each.reason for each in bad if each.condition is condition]
        if missing:
            return "; ".join(missing)
    reasons = [each.reason for each in bad]
    return before if before in reasons else reasons[0]


def _held_bytes(node: Node, key: StageKey, stage: StageRecord) -> int:
    """What a stage takes: as reported, at least as planned; while it loads, the most that it may take."""
    report = node.stages.get(key)
    if report is None or report.state is StageState.LOADING:
        return stage.limit_bytes
    return max(stage.needed_bytes, report.memory.total)


def _workers(record: PipelineRecord) -> list[Change]:
    """Every worker of a pipeline gets an answer."""
    return [WantedChanged(node_id) for node_id in _nodes_of(record)]


def _nodes_of(record: PipelineRecord) -> dict[str, None]:
    return dict.fromkeys(stage.node_id for stage in (*record.stages, *record.next_stages))
