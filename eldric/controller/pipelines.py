"""A pipeline as the controller keeps it, and what may be said of its stages. Pure."""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum

from eldric.controller.nodes import NodeState, StageKey, StageReport, StageState
from eldric.controller.registry import Node
from eldric.v1 import common_pb2, pipeline_pb2, stage_pb2

#: Beats in a row without a stage that make it missing: one may have been on its way when the stage was loaded.
ABSENT_BEATS = 2


class Phase(StrEnum):
    """What the controller wants of a pipeline; kept on disk."""

    DEPLOYING = "deploying"
    RUNNING = "running"
    UNDEPLOYING = "undeploying"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage: layers [start, end) on a process (`incarnation`) of a worker, and its planned bytes."""

    index: int
    worker: str
    incarnation: int
    start: int
    end: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    limit_bytes: int

    @property
    def node_id(self) -> str:
        return f"worker/{self.worker}"

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class PipelineRecord:
    """A pipeline. The three messages pass through as they are; nobody changes them.

    `next_stages`: those of `epoch` + 1, while a rebalance loads them.
    """

    id: str
    name: str
    model: str
    phase: Phase
    epoch: int
    stages: tuple[StageRecord, ...]
    created_at: float  # Unix time
    request: pipeline_pb2.DeployRequest
    options: common_pb2.StageOptions
    source: stage_pb2.ModelSource
    transport: str
    next_stages: tuple[StageRecord, ...] = ()

    def key(self, stage: StageRecord) -> StageKey:
        return StageKey(self.id, self.epoch, stage.index)

    @property
    def known(self) -> list[tuple[StageKey, StageRecord]]:
        """Every stage that is there, is being made or is being unloaded."""
        now = [(self.key(stage), stage) for stage in self.stages]
        return now + [(StageKey(self.id, self.epoch + 1, stage.index), stage) for stage in self.next_stages]

    @property
    def wanted(self) -> list[tuple[StageKey, StageRecord]]:
        """Every stage that should exist now."""
        return [] if self.phase is Phase.UNDEPLOYING else self.known


class Condition(Enum):
    """How a stage of a running pipeline is."""

    SERVING = "serving"
    WAITING = "waiting"  # not heard of yet since the controller started
    CLOSING = "closing"  # it serves, and its worker is about to end
    BROKEN = "broken"  # it is there, and a neighbour was lost to it
    ABSENT = "absent"  # its worker is there, without it
    MISSING = "missing"  # the process that held it is gone


@dataclass(frozen=True, slots=True)
class Verdict:
    """A stage's condition, and why: `reason` names the stage, `why` is for where it is named anyway."""

    condition: Condition
    reason: str = ""
    why: str = ""


def judge(record: PipelineRecord, stage: StageRecord, node: Node | None, absent: int, *, settled: bool) -> Verdict:
    """How a stage is. `absent`: beats in a row that did not name it; `settled`: every worker had time to report."""
    waiting = Verdict(Condition.WAITING, f"waiting for {stage.worker}")
    if node is None:
        return _missing(record, stage, "its worker left the cluster") if settled else waiting
    if node.info.incarnation != stage.incarnation:
        return _missing(record, stage, "its worker restarted")
    if node.state is NodeState.LOST:
        return _missing(record, stage, node.reason)
    report = node.stages.get(record.key(stage))
    if report is not None and report.state is StageState.BROKEN:
        return _broken(record, stage, report.message)
    if absent >= ABSENT_BEATS:
        return _verdict(Condition.ABSENT, record, stage, "gone", "its worker holds it no longer")
    if node.state is NodeState.DRAINING:
        return _verdict(Condition.CLOSING, record, stage, "closing", "its worker is about to end")
    if report is not None and report.state is StageState.SERVING:
        return Verdict(Condition.SERVING)
    return Verdict(Condition.SERVING) if settled else waiting


def _broken(record: PipelineRecord, stage: StageRecord, message: str) -> Verdict:
    """A stage that broke names the one that it lost, or itself if that stood still: that is the reason."""
    if re.match(r"stage \d+ of \d+ ", message):
        return Verdict(Condition.BROKEN, message, message)
    return _verdict(Condition.BROKEN, record, stage, "broken", message or "it does not say why")


def _missing(record: PipelineRecord, stage: StageRecord, why: str) -> Verdict:
    return _verdict(Condition.MISSING, record, stage, "gone", why)


def _verdict(condition: Condition, record: PipelineRecord, stage: StageRecord, state: str, why: str) -> Verdict:
    named = f"stage {stage.index} of {len(record.stages)} on worker {stage.worker}"
    return Verdict(condition, f"{named} is {state}: {why}", why)


def is_present(report: StageReport | None) -> bool:
    """Whether a report shows a stage that was connected."""
    return report is not None and report.state in (StageState.SERVING, StageState.BROKEN)
