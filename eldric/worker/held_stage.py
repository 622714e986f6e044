"""One stage of a worker, as its control loop sees it."""

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from eldric.v1 import common_pb2, stage_pb2
from eldric.worker.head import Head
from eldric.worker.head_thread import HeadThread
from eldric.worker.loading import LoadedStage


class StageKey(NamedTuple):
    pipeline_id: str
    stage: int
    epoch: int


@dataclass(slots=True, eq=False)
class HeldStage:
    """One stage: loading while `loaded` is None."""

    key: StageKey
    request: stage_pb2.LoadRequest
    reserved_bytes: int = 0
    options: common_pb2.StageOptions = field(default_factory=common_pb2.StageOptions)
    progress: stage_pb2.LoadProgress = field(default_factory=stage_pb2.LoadProgress)
    loaded: LoadedStage | None = None
    unwanted: int = 0
    mount_problem: str = ""  # what is wrong with the mount that it maps its weights from
    unloading: bool = False  # a load that is under way sees it and gives everything back
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    rewiring: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def head(self) -> Head | None:
        return self.loaded.head if self.loaded else None

    @property
    def memory_bytes(self) -> int:
        """What it holds, or has reserved while it loads."""
        if self.loaded is None:
            return self.reserved_bytes
        use = self.loaded.memory
        return use.mapped_bytes + use.repacked_bytes + use.kv_bytes + use.compute_bytes

    @property
    def is_busy(self) -> bool:
        """Whether a sequence runs or waits here."""
        if self.head is not None:
            return self.head.live > 0
        return self.loaded is not None and self.loaded.thread.sequences > 0

    @property
    def state(self) -> "stage_pb2.StageState.ValueType":
        """Where it is between loading and unloading."""
        if self.unloading:
            return stage_pb2.UNLOADING
        return stage_pb2.LOADING if self.loaded is None else self.loaded.thread.state

    def status(self) -> stage_pb2.StageStatus:
        """What the worker says of a stage, in heartbeats and on request."""
        request = self.request
        status = stage_pb2.StageStatus(
            pipeline_id=request.pipeline_id,
            name=request.name,
            epoch=request.epoch,
            index=request.index,
            stage_count=request.stage_count,
            layers=request.layers,
            state=self.state,
            progress=self.progress,
            options=self.options,
        )
        loaded = self.loaded
        if loaded is not None:
            thread = loaded.thread
            status.message, status.round = thread.message or self.mount_problem, thread.round
            status.memory.CopyFrom(loaded.memory)
            status.endpoint.CopyFrom(loaded.wiring.endpoint)
            status.sender_scheme = loaded.wiring.sender.scheme
            status.sender_key = loaded.wiring.sender.public_key
            if (link := thread.link) is not None:
                status.link.CopyFrom(link)
            status.step_ms, status.steps = thread.step_ms, thread.steps
            status.dropped_frames.update(thread.dropped_frames)
            status.refused_links = thread.refused_links
            status.slots_used = thread.sequences
            if isinstance(thread, HeadThread):
                status.queued = thread.waiting
            status.slots_total = self.options.slots
        return status
