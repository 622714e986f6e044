"""Loads a stage: opens the model's file, maps the shard, opens the tensor endpoint, makes the compute thread."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from eldric.engine.errors import LoadCancelled, ModelUnreadable
from eldric.engine.ggml.weights import WeightsMode
from eldric.engine.gguf import ModelFile
from eldric.engine.schedule import ScheduleConfig, Scheduler
from eldric.engine.shard import LayerRange, MemoryEstimate, memory_estimate, model_costs, shard_of
from eldric.engine.spec import ModelSpec, spec_of
from eldric.engine.stage import KVType, Stage, StageConfig
from eldric.errors import DeadlineExceeded, InvalidRequest, NotReady
from eldric.transport.errors import UnknownTransport
from eldric.transport.threads import require_threads
from eldric.v1 import common_pb2, stage_pb2
from eldric.worker.beside import Beside
from eldric.worker.body_thread import BodyThread
from eldric.worker.compute_thread import Place
from eldric.worker.config import WorkerConfig
from eldric.worker.convert import memory_use
from eldric.worker.head import Head
from eldric.worker.head_thread import HeadThread
from eldric.worker.metrics import WorkerMetrics
from eldric.worker.models import Models, OpenModel
from eldric.worker.mounted.changes import FileStamp
from eldric.worker.mounted.mounts import MountedFile, Mounts
from eldric.worker.range_cache.fetcher import RangeFetcher
from eldric.worker.relay import NodeRelay
from eldric.worker.resources import compute_device, compute_threads, lockable_bytes, memory_budget
from eldric.worker.standstill import Standstill
from eldric.worker.wiring import Rewired, Wirer, Wiring

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 4
DEFAULT_CHUNK = 64
MAX_CHUNK = 4096


WEIGHTS_MODES: dict[str, WeightsMode] = {"auto": "auto", "mapped": "mapped", "repacked": "repacked"}
KV_TYPES: dict[str, KVType] = {"f16": "f16", "f32": "f32"}

Choice = TypeVar("Choice")

#: Called with a phase, bytes done and bytes in all.
Tell = Callable[[str, int, int], None]


@dataclass(slots=True)
class LoadPlan:
    """A stage that can be loaded: the file is open and checked, nothing is mapped yet."""

    request: stage_pb2.LoadRequest
    opened: OpenModel
    spec: ModelSpec
    layers: LayerRange
    options: common_pb2.StageOptions  # settings in force
    estimate: MemoryEstimate

    @property
    def needed_bytes(self) -> int:
        return self.estimate.total

    @property
    def model(self) -> ModelFile:
        return self.opened.file

    def close(self) -> None:
        self.model.close()
        self.opened.release()


@dataclass(slots=True)
class LoadedStage:
    """A stage in memory. `head` is there for the first stage only."""

    thread: HeadThread | BodyThread
    head: Head | None
    wiring: Wiring
    memory: common_pb2.MemoryUse
    release: Callable[[], None]  # gives the model's file back, once the thread has ended
    mounted: MountedFile | None = None  # where the weights are mapped from, if that may hang
    transport_problem: str = ""  # why the wiring is not of the transport that was asked for
    stamps: tuple[FileStamp, ...] = ()  # the files that are mapped, as they were opened, if others may change them
    beside: Beside | None = None  # what may take the wiring's place, or what it took the place of

    def discard(self) -> None:
        """Give back a stage whose thread never started."""
        self.thread.discard()
        self.release()


class StageLoader:
    """Makes stages for one worker."""

    def __init__(
        self,
        config: WorkerConfig,
        metrics: WorkerMetrics,
        on_change: Callable[[], None],
        fetcher: RangeFetcher | None = None,
        relay: NodeRelay | None = None,
    ) -> None:
        """`on_change` is called in the control loop when a stage's state changed. Without a fetcher, models are read
        from the mount alone. `relay`: the tunnel of a worker behind an edge."""
        self._config = config
        #: The mounts that models are read from.
        self.mounts = Mounts(config.node.folder / "mounts", config.models_dir)
        self._models = Models(config, self.mounts, fetcher, relay)
        self._wirer = Wirer(config, relay)
        self._standstill = Standstill(config.silence_s)
        self._metrics = metrics
        self._on_change = on_change

    def prepare(self, request: stage_pb2.LoadRequest, cancelled: Callable[[], bool] = lambda: False) -> LoadPlan:
        """Open the file and count what the stage needs. Reads the header only; may block.

        Raises NotFound, NotReady, InvalidModel, UnsupportedModel, InvalidRequest, and what Models.open raises besides.
        """
        opened = self._models.open(request.source, cancelled)
        model = opened.file
        try:
            spec = spec_of(model)
            layers = LayerRange(request.layers.start, request.layers.end)
            _check_place(request, spec)
            options = self._settle(request, spec)
            estimate = memory_estimate(
                model_costs(model, spec),
                layers,
                context=options.context,
                slots=options.slots,
                chunk=options.chunk,
                kv_value_bytes=4 if options.kv_type == "f32" else 2,
            )
        except BaseException:
            model.close()
            opened.release()
            raise
        return LoadPlan(request, opened, spec, layers, options, estimate)

    def _settle(self, request: stage_pb2.LoadRequest, spec: ModelSpec) -> common_pb2.StageOptions:
        """The request's options with this worker's defaults filled in. Raises InvalidRequest."""
        options = common_pb2.StageOptions()
        options.CopyFrom(request.options)
        options.context = options.context or min(spec.context_length, DEFAULT_CONTEXT)
        options.slots = options.slots or DEFAULT_SLOTS
        options.chunk = min(options.chunk or DEFAULT_CHUNK, options.context)
        options.lanes = options.lanes or request.stage_count
        options.threads = options.threads or compute_threads(self._config)
        options.weights = options.weights or "auto"
        options.kv_type = options.kv_type or "f16"
        _choice("weights", options.weights, WEIGHTS_MODES)
        _choice("kv_type", options.kv_type, KV_TYPES)
        if options.chunk > MAX_CHUNK:
            raise InvalidRequest(f"a chunk of {options.chunk} tokens; at most {MAX_CHUNK}")
        return options

    async def load(
        self,
        plan: LoadPlan,
        progress: Callable[[stage_pb2.LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> LoadedStage:
        """Fetch what is missing, map the weights and open the endpoint. Closes the plan, but for the file of a stage
        that was loaded; when it fails, nothing is left half made."""
        loop = asyncio.get_running_loop()

        def tell(phase: str, done: int, total: int) -> None:
            event = stage_pb2.LoadProgress(phase=phase, done_bytes=done, total_bytes=total)
            loop.call_soon_threadsafe(progress, event)

        try:
            stage = await asyncio.to_thread(self._bring_in_somehow, plan, tell, cancelled)
        except BaseException:
            plan.close()
            raise
        plan.model.close()
        try:
            if cancelled():
                raise LoadCancelled("the load was cancelled")
            rewired = await asyncio.to_thread(self._wirer.first, plan.request)
            return self._assemble(plan, stage, rewired)
        except BaseException:
            stage.close()
            plan.opened.release()
            raise

    def _bring_in_somehow(self, plan: LoadPlan, tell: Tell, cancelled: Callable[[], bool]) -> Stage:
        """From where the model was found, and over HTTP when that is a mount which fails or hangs meanwhile."""
        try:
            return self._bring_in(plan, tell, cancelled)
        except (ModelUnreadable, DeadlineExceeded) as error:
            other = self._models.instead(plan.opened, plan.request.source, cancelled)
            if other is None:
                raise
            log.warning(
                "event=mount_failed model=%s reason=%r: going on over HTTP", plan.request.source.model, str(error)
            )
        plan.close()
        plan.opened = other
        return self._bring_in(plan, tell, cancelled)

    def _bring_in(self, plan: LoadPlan, tell: Tell, cancelled: Callable[[], bool]) -> Stage:
        left = 0  # bytes to be fetched: while there are some, they are what is told of

        def fetching(done: int, total: int) -> None:
            nonlocal left
            left = total - done
            tell("fetching", done, total)

        def mapping(done: int, total: int) -> None:
            if not left:
                tell("mapping", done, total)

        ranges = shard_of(plan.model, plan.spec, plan.layers).ranges
        stage = None
        try:
            _require_threads(plan.options.threads)
            with plan.opened.reader(ranges, fetching, cancelled) as wait:
                stage = Stage.load(plan.model, self._stage_config(plan), mapping, cancelled, wait)
        except BaseException:
            if stage is not None:
                stage.close()
            raise
        if plan.opened.mounted is None:
            return stage
        if self._config.lock != "off" and stage.memory.locked < stage.memory.mapped:
            log.warning(
                "event=not_locked locked_bytes=%d mapped_bytes=%d: an evicted page must be read again; "
                "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
                stage.memory.locked,
                stage.memory.mapped,
            )
        return stage

    def _locks(self, plan: LoadPlan) -> bool:
        """Whether weights are locked. A limit that not all of them fit is left to others, such as keys and RDMA."""
        wanted = self._config.lock == "on" or (self._config.lock == "auto" and plan.opened.mounted is not None)
        return wanted and plan.estimate.weights <= lockable_bytes()

    def _stage_config(self, plan: LoadPlan) -> StageConfig:
        options = plan.options
        return StageConfig(
            layers=plan.layers,
            context=options.context,
            slots=options.slots,
            chunk=options.chunk,
            lane_slots=options.slots,
            lanes=options.lanes,
            threads=options.threads,
            cpus=self._config.cpus,
            device=compute_device(self._config).name,
            exact=options.exact if options.HasField("exact") else None,
            weights=_choice("weights", options.weights, WEIGHTS_MODES),
            kv_type=_choice("kv_type", options.kv_type, KV_TYPES),
            repack_budget_bytes=self._repack_budget(plan),
            lock=self._locks(plan),
        )

    def _repack_budget(self, plan: LoadPlan) -> int:
        """Copies of weights replace mapped pages, so they may take what the plan or this worker has for weights."""
        limit = plan.request.memory_limit_bytes or memory_budget(self._config)
        return max(0, limit - plan.estimate.kv - plan.estimate.compute)

    async def open_links(self, loaded: LoadedStage, request: stage_pb2.LoadRequest, receive: str, send: str) -> Rewired:
        """Make transports of these schemes for a stage, where it has none. The caller hands them to its thread."""
        return await asyncio.to_thread(self._wirer.other, loaded.wiring, request, receive, send)

    def _assemble(self, plan: LoadPlan, stage: Stage, rewired: Rewired) -> LoadedStage:
        request, options, transport = plan.request, plan.options, rewired.wiring.receiver
        options.exact = stage.exact
        try:
            place = Place(request.pipeline_id, request.epoch, request.index, request.stage_count)
            loop = asyncio.get_running_loop()

            def changed() -> None:
                loop.call_soon_threadsafe(self._on_change)

            thread: HeadThread | BodyThread
            head = None
            if request.index == 0:
                limit = options.slots + self._config.queue
                spec = plan.spec
                head = Head(request.name, spec.vocab_size, options.context, limit, self._metrics, spec.embeds_last)
                scheduler = Scheduler(self._schedule_config(plan, stage))
                thread = HeadThread(
                    stage, transport, place, changed, self._standstill.seconds, scheduler, head.deliver, head.trace
                )
                head.attach(thread.post)
            else:
                thread = BodyThread(stage, transport, place, changed, self._standstill.seconds)
        except BaseException:
            transport.close()
            raise
        release, mounted = plan.opened.release, plan.opened.mounted
        memory, problem = memory_use(stage.memory), rewired.receive_problem
        stamps = plan.opened.stamps if stage.memory.mapped else ()
        return LoadedStage(thread, head, rewired.wiring, memory, release, mounted, problem, stamps)

    def _schedule_config(self, plan: LoadPlan, stage: Stage) -> ScheduleConfig:
        options = plan.options
        return ScheduleConfig(
            slots=options.slots,
            context=options.context,
            chunk=options.chunk,
            lanes=options.lanes,
            decode_rows=stage.lane_slots,
            queue=self._config.queue,
            stages=plan.request.stage_count,
            cuts_freely=stage.cuts_freely,
        )


def _check_place(request: stage_pb2.LoadRequest, spec: ModelSpec) -> None:
    """The head begins the model and the tail ends it, and nobody else does. Raises InvalidRequest."""
    start, end = request.layers.start, request.layers.end
    if end > spec.layers:
        raise InvalidRequest(f"layers [{start}, {end}) of a model that has {spec.layers}")
    if (start == 0, end == spec.layers) != (request.index == 0, request.index == request.stage_count - 1):
        raise InvalidRequest(
            f"layers [{start}, {end}) of {spec.layers} are not those of stage {request.index} of {request.stage_count}"
        )


def _require_threads(count: int) -> None:
    """The compute library would end the process. Raises NotReady."""
    try:
        require_threads(count)
    except UnknownTransport as error:
        raise NotReady(str(error)) from error


def _choice(name: str, value: str, choices: dict[str, Choice]) -> Choice:
    if value not in choices:
        raise InvalidRequest(f"{name} is {value!r}; it can be {', '.join(choices)}")
    return choices[value]
