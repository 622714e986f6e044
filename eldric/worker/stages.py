"""The stages that a worker holds: loaded, connected, unloaded. Belongs to the control loop."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from eldric.errors import AlreadyExists, InvalidRequest, NotEnoughMemory, NotFound, NotReady, StaleEpoch
from eldric.transport.base import Peer
from eldric.v1 import common_pb2, heartbeat_pb2, stage_pb2
from eldric.worker.commands import Connect, Degrade, Stop
from eldric.worker.config import WorkerConfig
from eldric.worker.head import Head
from eldric.worker.head_thread import HeadThread
from eldric.worker.loading import LoadedStage, StageLoader
from eldric.worker.resources import memory_budget

log = logging.getLogger(__name__)

#: Answers in a row that must leave a stage out before it is unloaded: one may be older than the stage.
_UNWANTED_ANSWERS = 3

#: Longest wait for a compute thread to end its step and give its memory back.
_JOIN_S = 30.0

Progress = Callable[[stage_pb2.LoadProgress], None]


class StageKey(NamedTuple):
    pipeline_id: str
    stage: int
    epoch: int


@dataclass(slots=True, eq=False)
class HeldStage:
    """One stage: loading while `loaded` is None."""

    key: StageKey
    request: stage_pb2.LoadRequest
    reserved_bytes: int
    options: common_pb2.StageOptions
    progress: stage_pb2.LoadProgress = field(default_factory=stage_pb2.LoadProgress)
    cancelled: bool = False
    loaded: LoadedStage | None = None
    unwanted: int = 0
    unloading: bool = False

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


class StageTable:
    """All stages of this worker, by pipeline, index and epoch."""

    def __init__(self, config: WorkerConfig, loader: StageLoader) -> None:
        self._config = config
        self._loader = loader
        self._stages: dict[StageKey, HeldStage] = {}

    def __iter__(self) -> Iterator[HeldStage]:
        return iter(tuple(self._stages.values()))

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def memory_used_bytes(self) -> int:
        return sum(stage.memory_bytes for stage in self._stages.values())

    def find_head(self, name: str) -> Head:
        """The head of the pipeline of that name or id: the newest that serves, or the newest when none does.

        Raises NotFound, or NotReady while it loads.
        """
        found = [
            stage
            for stage in self._stages.values()
            if stage.key.stage == 0 and name in (stage.request.name, stage.request.pipeline_id)
        ]
        if not found:
            raise NotFound(f"this worker is not the head of a pipeline {name!r}")
        heads = [stage for stage in found if stage.head is not None and not stage.unloading]
        if not heads:
            raise NotReady(f"the head of pipeline {name!r} is still loading")
        best = max(heads, key=lambda stage: (_is_serving(stage), stage.key.epoch)).head
        assert best is not None
        return best

    async def load(self, request: stage_pb2.LoadRequest, progress: Progress) -> stage_pb2.Loaded:
        """Load a stage. When this task is cancelled, what was loaded is given back.

        Raises AlreadyExists, NotEnoughMemory, InvalidRequest and what the loader raises.
        """
        key = self._admit(request)
        plan = await asyncio.to_thread(self._loader.prepare, request)
        free = memory_budget(self._config) - self.memory_used_bytes
        if plan.needed_bytes > free:
            plan.close()
            raise NotEnoughMemory(
                f"stage {key.stage} of {request.name!r} needs {plan.needed_bytes} bytes, and worker "
                f"{self._config.node.name} has {free} free"
            )
        if key in self._stages:
            plan.close()
            raise AlreadyExists(f"worker {self._config.node.name} is loading stage {key.stage} of {request.name!r}")
        held = HeldStage(key, request, plan.needed_bytes, plan.options)
        self._stages[key] = held

        def advance(event: stage_pb2.LoadProgress) -> None:
            held.progress = event
            progress(event)

        loading = asyncio.ensure_future(self._loader.load(plan, advance, lambda: held.cancelled))
        try:
            held.loaded = await asyncio.shield(loading)
        except BaseException:
            held.cancelled = True
            held.unloading = True
            await self._give_up(held, loading)
            raise
        held.loaded.thread.start()
        log.info("stage loaded %s bytes=%d", held.loaded.thread.place.key, held.memory_bytes)
        return stage_pb2.Loaded(endpoint=held.loaded.endpoint, memory=held.loaded.memory)

    def _admit(self, request: stage_pb2.LoadRequest) -> StageKey:
        if not request.pipeline_id or request.stage_count == 0 or request.index >= request.stage_count:
            raise InvalidRequest("a load request needs a pipeline id, and an index below its stage count")
        if request.insecure_tensors and not self._config.allow_insecure_tensors:
            raise InvalidRequest(
                f"worker {self._config.node.name} does not allow unencrypted tensor channels; "
                "start it with --allow-insecure-tensors"
            )
        key = StageKey(request.pipeline_id, request.index, request.epoch)
        for held in self._stages:
            if held[:2] == key[:2] and held.epoch >= key.epoch:
                raise AlreadyExists(
                    f"worker {self._config.node.name} holds stage {key.stage} of {request.name!r}, epoch {held.epoch}"
                )
        return key

    async def _give_up(self, held: HeldStage, loading: "asyncio.Future[LoadedStage]") -> None:
        try:
            loaded = await loading
        except Exception as error:
            log.info("load ended pipeline=%s stage=%d reason=%s", *held.key[:2], error)
        else:
            loaded.discard()
        finally:
            self._stages.pop(held.key, None)

    async def connect(self, request: stage_pb2.ConnectRequest) -> None:
        """Name a stage's neighbours, and wait until the next one is reached.

        Raises NotFound, NotReady while it loads, StaleEpoch, TransportError.
        """
        held = self._held(request)
        if held.loaded is None:
            raise NotReady(f"stage {request.index} is still loading")
        if request.HasField("next"):
            peer = Peer(request.next.address, request.next.public_key, request.next_index)
        else:
            peer = None
        command = Connect(request.epoch, peer, frozenset(request.allowed_keys))
        held.loaded.thread.post(command)
        await asyncio.wrap_future(command.done)

    def _held(self, request: stage_pb2.ConnectRequest) -> HeldStage:
        stages = [stage for stage in self if stage.key[:2] == (request.pipeline_id, request.index)]
        if not stages:
            raise NotFound(f"this worker holds no stage {request.index} of pipeline {request.pipeline_id}")
        for stage in stages:
            if stage.key.epoch == request.epoch:
                return stage
        newest = max(stage.key.epoch for stage in stages)
        raise StaleEpoch(f"stage {request.index} is of epoch {newest}, not {request.epoch}")

    async def unload(self, pipeline_id: str, index: int | None = None, epoch: int = 0) -> int:
        """Unload the pipeline's stages (only `index`, only up to `epoch`, where given). Returns how many."""
        chosen = [
            stage
            for stage in self
            if stage.key.pipeline_id == pipeline_id
            and index in (None, stage.key.stage)
            and (epoch == 0 or stage.key.epoch <= epoch)
        ]
        await asyncio.gather(*(self._unload(stage) for stage in chosen))
        return len(chosen)

    async def _unload(self, held: HeldStage) -> None:
        held.cancelled = held.unloading = True
        if held.loaded is None:
            return  # the load sees `cancelled` and gives everything back
        thread = held.loaded.thread
        thread.post(Stop())
        if not await asyncio.to_thread(thread.join, _JOIN_S):
            log.error("stage does not end %s", thread.place.key)
        if self._stages.pop(held.key, None) is not None:
            log.info("stage unloaded %s", thread.place.key)

    async def follow(self, wanted: list[heartbeat_pb2.WantedStage]) -> None:
        """Do what a heartbeat's answer wants: degrade, and unload what nobody wants any more."""
        by_key = {StageKey(want.pipeline_id, want.index, want.epoch): want for want in wanted}
        unwanted = []
        for held in self:
            want = by_key.get(held.key)
            held.unwanted = 0 if want else held.unwanted + 1
            if want is not None and want.degraded and _serves(held):
                assert held.loaded is not None
                held.loaded.thread.post(Degrade("another stage of the pipeline is lost"))
            if held.unwanted >= _UNWANTED_ANSWERS and not held.unloading:
                unwanted.append(held)
        for held in unwanted:
            log.warning("unloading a stage that no deployment wants pipeline=%s stage=%d", *held.key[:2])
        await asyncio.gather(*(self._unload(held) for held in unwanted))

    async def close(self) -> None:
        """Unload everything."""
        await asyncio.gather(*(self._unload(held) for held in self))


def status_of(held: HeldStage) -> stage_pb2.StageStatus:
    """What the worker says of a stage, in heartbeats and on request."""
    request = held.request
    status = stage_pb2.StageStatus(
        pipeline_id=request.pipeline_id,
        name=request.name,
        epoch=request.epoch,
        index=request.index,
        stage_count=request.stage_count,
        layers=request.layers,
        state=stage_pb2.LOADING,
        progress=held.progress,
        options=held.options,
    )
    loaded = held.loaded
    if loaded is not None:
        thread = loaded.thread
        status.state, status.message = thread.state, thread.message
        status.memory.CopyFrom(loaded.memory)
        status.endpoint.CopyFrom(loaded.endpoint)
        status.step_ms, status.steps = thread.step_ms, thread.steps
        status.dropped_frames.update(thread.dropped_frames)
        if isinstance(thread, HeadThread):
            status.slots_used, status.queued = thread.running, thread.waiting
        status.slots_total = held.options.slots
    if held.unloading:
        status.state = stage_pb2.UNLOADING
    return status


def _is_serving(held: HeldStage) -> bool:
    return held.loaded is not None and held.loaded.thread.state == stage_pb2.SERVING


def _serves(held: HeldStage) -> bool:
    return held.loaded is not None and held.loaded.thread.state != stage_pb2.BROKEN
