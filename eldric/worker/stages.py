"""The stages that a worker holds: loaded, connected, unloaded. Belongs to the control loop."""

import asyncio
import logging
from collections.abc import Callable, Iterator

from eldric.engine.errors import LoadCancelled
from eldric.errors import (
    AlreadyExists,
    InvalidRequest,
    NotEnoughMemory,
    NotFound,
    NotReady,
    StaleEpoch,
    Unavailable,
)
from eldric.transport.base import Peer
from eldric.v1 import heartbeat_pb2, stage_pb2
from eldric.worker.beside import Beside
from eldric.worker.commands import Connect, Degrade, Rewire, Stop, Switch
from eldric.worker.config import WorkerConfig
from eldric.worker.head import Head
from eldric.worker.held_stage import HeldStage, StageKey
from eldric.worker.loading import LoadedStage, StageLoader
from eldric.worker.resources import memory_budget
from eldric.worker.wiring import Rewired

log = logging.getLogger(__name__)

#: Answers in a row that must leave a stage out before it is unloaded: one may be older than the stage.
_UNWANTED_ANSWERS = 3

#: Time between two looks at what still runs while the worker drains.
_DRAIN_POLL_S = 0.02

#: Longest wait for a compute thread to end its step and give its memory back.
_JOIN_S = 30.0

#: States of a stage that has not lost a neighbour.
_UNBROKEN = (stage_pb2.LOADED, stage_pb2.SERVING)

Progress = Callable[[stage_pb2.LoadProgress], None]


class StageTable:
    """All stages of this worker, by pipeline, index and epoch."""

    def __init__(self, config: WorkerConfig, loader: StageLoader) -> None:
        self._config = config
        self._loader = loader
        self._stages: dict[StageKey, HeldStage] = {}
        self._giving_up: set[asyncio.Future[None]] = set()
        self._draining = False

    def __iter__(self) -> Iterator[HeldStage]:
        return iter(tuple(self._stages.values()))

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def memory_used_bytes(self) -> int:
        return sum(stage.memory_bytes for stage in self._stages.values())

    def find_head(self, name: str) -> Head:
        """The head of the pipeline of that name or id: the newest that serves, or the newest when none does.

        Raises NotFound, NotReady while it loads, Unavailable when the worker is about to end.
        """
        if self._draining:
            raise self._about_to_end()
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
        best = max(heads, key=lambda stage: (stage.state == stage_pb2.SERVING, stage.key.epoch)).head
        assert best is not None
        return best

    async def load(self, request: stage_pb2.LoadRequest, progress: Progress) -> stage_pb2.Loaded:
        """Load a stage. When this task is cancelled, what was loaded is given back.

        Raises AlreadyExists, NotEnoughMemory, InvalidRequest, NotReady without a thread for it, and what the loader
        raises.
        """
        held = self._admit(request)
        loading = asyncio.ensure_future(self._bring(held, progress))
        try:
            loaded = await asyncio.shield(loading)
            if held.unloading:
                raise LoadCancelled("the stage was unloaded while it was loading")
            loaded.thread.start()
        except BaseException as error:
            held.unloading = True
            giving_up = asyncio.ensure_future(self._give_up(held, loading))
            self._giving_up.add(giving_up)
            giving_up.add_done_callback(self._giving_up.discard)
            await asyncio.shield(giving_up)  # it goes on, should this task be cancelled again
            if self._draining and isinstance(error, LoadCancelled):
                raise self._about_to_end() from error
            raise
        held.loaded = loaded
        log.info("stage loaded %s bytes=%d", loaded.thread.place.key, held.memory_bytes)
        return stage_pb2.Loaded(
            endpoint=loaded.wiring.endpoint, memory=loaded.memory, transport_problem=loaded.transport_problem
        )

    async def _bring(self, held: HeldStage, progress: Progress) -> LoadedStage:
        """Runs to its end: whoever does not want it any more sets `unloading`."""
        request = held.request
        plan = await asyncio.to_thread(self._loader.prepare, request, lambda: held.unloading)
        free = memory_budget(self._config) - self.memory_used_bytes
        if plan.needed_bytes > free:
            plan.close()
            raise NotEnoughMemory(
                f"stage {request.index} of {request.name!r} needs {plan.needed_bytes} bytes, and worker "
                f"{self._config.node.name} has {free} free"
            )
        held.reserved_bytes, held.options = plan.needed_bytes, plan.options

        def advance(event: stage_pb2.LoadProgress) -> None:
            held.progress = event
            progress(event)

        return await self._loader.load(plan, advance, lambda: held.unloading)

    def _admit(self, request: stage_pb2.LoadRequest) -> HeldStage:
        if self._draining:
            raise self._about_to_end()
        if not request.pipeline_id or request.epoch == 0 or request.index >= request.stage_count:
            raise InvalidRequest("a load request needs a pipeline id, an epoch, and an index below its stage count")
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
        self._stages[key] = HeldStage(key, request)
        return self._stages[key]

    def _about_to_end(self) -> Unavailable:
        return Unavailable(f"worker {self._config.node.name} is about to end")

    async def _give_up(self, held: HeldStage, loading: "asyncio.Future[LoadedStage]") -> None:
        try:
            await asyncio.wait([loading])
            if (error := loading.exception()) is None:
                await asyncio.to_thread(loading.result().discard)
            else:
                log.info("load ended pipeline=%s stage=%d reason=%s", *held.key[:2], error)
        finally:
            self._forget(held)

    def _forget(self, held: HeldStage) -> None:
        self._stages.pop(held.key, None)
        if held.loaded is not None:
            held.loaded.release()
        held.gone.set()

    async def open_links(self, request: stage_pb2.OpenLinksRequest) -> stage_pb2.OpenLinksResponse:
        """Let a stage receive and send by transports of these schemes, or open them beside those in use.

        Raises NotFound, NotReady, StaleEpoch.
        """
        held = self._held(request)
        async with held.rewiring:
            loaded = self._ready(held)
            await _drop_beside(loaded)
            if request.beside and not (request.receive or request.send):
                return _opened(Rewired(loaded.wiring))
            rewired = await self._loader.open_links(loaded, held.request, request.receive, request.send)
            made = rewired.wiring
            if held.unloading:
                for transport in set(made.transports) - set(loaded.wiring.transports):
                    transport.close()
            self._ready(held)
            if request.beside:
                loaded.beside = Beside(made, loaded.wiring)
            else:
                command = Rewire(made.receiver, made.sender)
                loaded.thread.post(command)
                loaded.wiring = made
                await asyncio.wrap_future(command.done)
        return _opened(rewired)

    def _ready(self, held: HeldStage) -> LoadedStage:
        """Raises NotReady for a stage that is loading or being unloaded."""
        if held.loaded is None or held.unloading:
            state = "being unloaded" if held.unloading else "still loading"
            raise NotReady(f"stage {held.key.stage} is {state}")
        return held.loaded

    async def connect(self, request: stage_pb2.ConnectRequest) -> bool:
        """Name a stage's neighbours, and wait until the next one is reached.

        Returns False when the head was asked to switch while it has sequences. Raises NotFound, NotReady while it
        loads, StaleEpoch for an older epoch or round, TransportError.
        """
        held = self._held(request)
        loaded = self._ready(held)
        if request.round < loaded.thread.round:
            raise StaleEpoch(f"stage {request.index} was connected in round {loaded.thread.round}, not {request.round}")
        if request.phase == stage_pb2.NOW:
            return await _connect(loaded, request)
        async with held.rewiring:
            self._ready(held)
            if request.phase == stage_pb2.SWITCH:
                return await _switch(loaded, request)
            beside = loaded.beside or Beside(loaded.wiring, loaded.wiring)
            timeout_s = request.try_ms / 1000
            await asyncio.to_thread(beside.connect, *_neighbours(request), request.epoch, request.round, timeout_s)
        return True

    def _held(self, request: stage_pb2.ConnectRequest | stage_pb2.OpenLinksRequest) -> HeldStage:
        stages = [stage for stage in self if stage.key[:2] == (request.pipeline_id, request.index)]
        if not stages:
            raise NotFound(f"this worker holds no stage {request.index} of pipeline {request.pipeline_id}")
        for stage in stages:
            if stage.key.epoch == request.epoch:
                return stage
        newest = max(stage.key.epoch for stage in stages)
        raise StaleEpoch(f"stage {request.index} is of epoch {newest}, not {request.epoch}")

    async def unload(self, pipeline_id: str, index: int | None = None, epoch: int = 0, reason: str = "") -> int:
        """Unload the pipeline's stages (only `index`, only up to `epoch`, where given). Returns how many.

        reason: what generations that run are told.
        """
        chosen = [
            stage
            for stage in self
            if stage.key.pipeline_id == pipeline_id
            and index in (None, stage.key.stage)
            and (epoch == 0 or stage.key.epoch <= epoch)
        ]
        await asyncio.gather(*(self._unload(stage, reason or "the pipeline was undeployed") for stage in chosen))
        return len(chosen)

    async def _unload(self, held: HeldStage, reason: str) -> None:
        """Returns when its memory and ports are given back. reason: what generations that run are told."""
        held.unloading = True
        if held.loaded is None:
            await held.gone.wait()
            return
        thread = held.loaded.thread
        thread.post(Stop(reason))
        if not await asyncio.to_thread(thread.join, _JOIN_S):
            log.error("stage does not end %s", thread.place.key)
        if held.head is not None:
            held.head.close()
        async with held.rewiring:
            await _drop_beside(held.loaded)
        if not held.gone.is_set():
            self._forget(held)
            log.info("stage unloaded %s", thread.place.key)

    async def follow(self, wanted: list[heartbeat_pb2.WantedStage]) -> None:
        """Do what a heartbeat's answer wants: degrade, shut, and unload what nobody wants any more."""
        by_key = {StageKey(want.pipeline_id, want.index, want.epoch): want for want in wanted}
        unwanted = []
        for held in self:
            want = by_key.get(held.key)
            held.unwanted = 0 if want else held.unwanted + 1
            if want is not None and want.degraded and held.loaded is not None and held.state in _UNBROKEN:
                held.loaded.thread.post(Degrade(want.reason or "another stage of the pipeline is lost"))
            if want is not None and held.head is not None:
                closing = want.reason or "a worker of the pipeline is about to end"
                held.head.shut(f"{closing}; try again soon" if want.closing else "")
            if held.unwanted >= _UNWANTED_ANSWERS and not held.unloading:
                unwanted.append(held)
        for held in unwanted:
            log.warning("unloading a stage that no deployment wants pipeline=%s stage=%d", *held.key[:2])
        await asyncio.gather(*(self._unload(held, "no deployment wants this stage") for held in unwanted))

    async def drain(self) -> None:
        """Take nothing new, and wait until no sequence is left: none at a head, and in other stages none of others'.

        Loads end at once: their pipelines would have to do without this worker.
        """
        self._draining = True
        for held in self:
            held.unloading = held.unloading or held.loaded is None
        while any(held.is_busy for held in self):
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Unload everything."""
        reason = f"worker {self._config.node.name} has ended"
        await asyncio.gather(*(self._unload(held, reason) for held in self))


def _opened(rewired: Rewired) -> stage_pb2.OpenLinksResponse:
    made = rewired.wiring
    return stage_pb2.OpenLinksResponse(
        endpoint=made.endpoint,
        sender_scheme=made.sender.scheme,
        sender_key=made.sender.public_key,
        receive_problem=rewired.receive_problem,
        send_problem=rewired.send_problem,
    )


def _neighbours(request: stage_pb2.ConnectRequest) -> tuple[Peer | None, frozenset[str]]:
    """The next stage, and the keys of the one before."""
    after = request.next
    peer = Peer(after.address, after.public_key, request.next_index) if request.HasField("next") else None
    return peer, frozenset(request.allowed_keys)


async def _connect(loaded: LoadedStage, request: stage_pb2.ConnectRequest, switch: Switch | None = None) -> bool:
    peer, allowed = _neighbours(request)
    workers, fallback, try_s = tuple(request.workers), request.fallback[:1024], request.try_ms / 1000
    command = Connect(request.epoch, peer, allowed, workers, request.round, fallback, try_s, switch)
    loaded.thread.post(command)
    return await asyncio.wrap_future(command.done)


async def _switch(loaded: LoadedStage, request: stage_pb2.ConnectRequest) -> bool:
    """Go over to what was opened beside; what was used until now takes its place there."""
    made = loaded.wiring if loaded.beside is None else loaded.beside.wiring
    switch = Switch(made.receiver, made.sender, if_idle=loaded.head is not None)
    switching = asyncio.ensure_future(_connect(loaded, request, switch))

    def switched(done: "asyncio.Future[bool]") -> None:
        if done.exception() is not None or done.result():
            loaded.wiring = made

    switching.add_done_callback(switched)
    return await asyncio.shield(switching)  # it goes on when the caller leaves


async def _drop_beside(loaded: LoadedStage) -> None:
    beside, loaded.beside = loaded.beside, None
    if beside is not None:
        await asyncio.to_thread(beside.close, loaded.wiring)
