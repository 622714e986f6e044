"""The stages that a worker holds, with a loader and threads that do as they are told."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from eldric.config import NodeConfig
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
from eldric.transport.inproc import InprocTransport
from eldric.v1 import common_pb2, heartbeat_pb2, stage_pb2
from eldric.worker.commands import Connect, Degrade, Stop
from eldric.worker.compute_thread import Place
from eldric.worker.config import WorkerConfig
from eldric.worker.stages import _UNWANTED_ANSWERS as UNWANTED_ANSWERS
from eldric.worker.stages import StageTable
from eldric.worker.wiring import Wiring

pytestmark = pytest.mark.timeout(10)

BUDGET = 1000


class FakeThread:
    """A compute thread that keeps what it is posted, and ends when it is told."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.state: stage_pb2.StageState.ValueType = stage_pb2.LOADED
        self.message, self.step_ms, self.steps, self.sequences, self.refused_links = "", 0.0, 0, 0, 0
        self.round, self.link = 0, None
        self.dropped_frames: dict[str, int] = {}
        self.posted: list[Any] = []
        self.started = self.discarded = False
        self.start_error: Exception | None = None
        self.may_end = threading.Event()
        self.may_end.set()

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.started = True

    def post(self, command: Any) -> None:
        self.posted.append(command)
        if isinstance(command, Connect):
            self.state = stage_pb2.SERVING
            command.done.set_result(True)

    def join(self, timeout_s: float) -> bool:
        return self.may_end.wait(timeout_s)


@dataclass
class FakeHead:
    live: int = 0
    closed: bool = False
    shut_for: str = ""

    def shut(self, reason: str) -> None:
        self.shut_for = reason

    def close(self) -> None:
        self.closed = True


@dataclass
class FakePlan:
    needed_bytes: int
    options: common_pb2.StageOptions = field(default_factory=common_pb2.StageOptions)
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLoaded:
    thread: FakeThread
    head: FakeHead | None
    wiring: Wiring
    memory: common_pb2.MemoryUse
    transport_problem: str = ""
    released: bool = False
    beside: None = None

    def discard(self) -> None:
        self.thread.discarded = True

    def release(self) -> None:
        self.released = True


class FakeLoader:
    """Loads when `gate` is open; `arrived` is set when a load has come that far."""

    def __init__(self) -> None:
        self.needed_bytes = 100
        self.error: Exception | None = None
        self.gate, self.arrived = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.before_it_is_known: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
        self.plans: list[FakePlan] = []
        self.made: list[FakeLoaded] = []

    def prepare(self, request: stage_pb2.LoadRequest, cancelled: Callable[[], bool]) -> FakePlan:
        if self.error is not None:
            raise self.error
        self.plans.append(FakePlan(self.needed_bytes))
        return self.plans[-1]

    async def load(self, plan: FakePlan, progress: Callable[[Any], None], cancelled: Callable[[], bool]) -> FakeLoaded:
        progress(stage_pb2.LoadProgress(phase="mapping", done_bytes=1, total_bytes=2))
        self.arrived.set()
        await self.gate.wait()
        plan.close()
        if cancelled():
            raise LoadCancelled("it was cancelled")
        place = Place("p", 1, 0, 1)
        memory = common_pb2.MemoryUse(mapped_bytes=60, kv_bytes=20)
        transport = InprocTransport("p", 0)
        wiring = Wiring(transport, transport, common_pb2.TensorEndpoint())
        self.made.append(FakeLoaded(FakeThread(place), FakeHead(), wiring, memory))
        await self.before_it_is_known()
        return self.made[-1]

    @property
    def thread(self) -> FakeThread:
        return self.made[-1].thread


class World:
    def __init__(self) -> None:
        self.loader = FakeLoader()
        node = NodeConfig("worker", "w1", Path("/nowhere"), controllers=("127.0.0.1:1",))
        self.table = StageTable(WorkerConfig(node, memory_bytes=BUDGET), cast(Any, self.loader))

    async def load(self, **fields: Any) -> stage_pb2.Loaded:
        return await self.table.load(request(**fields), lambda _: None)

    def start_load(self, **fields: Any) -> "asyncio.Task[stage_pb2.Loaded]":
        self.loader.gate.clear()
        return asyncio.create_task(self.load(**fields))


@pytest.fixture
async def world() -> World:
    return World()


def request(**fields: Any) -> stage_pb2.LoadRequest:
    made: dict[str, Any] = {"pipeline_id": "p", "name": "pipe", "epoch": 1, "index": 0, "stage_count": 1, **fields}
    return stage_pb2.LoadRequest(**made)


def wanted(epoch: int = 1, degraded: bool = False) -> heartbeat_pb2.WantedStage:
    return heartbeat_pb2.WantedStage(pipeline_id="p", epoch=epoch, index=0, degraded=degraded)


async def test_a_loaded_stage_counts_what_it_holds(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    (held,) = world.table
    assert (held.status().state, held.status().progress.phase) == (stage_pb2.LOADING, "mapping")
    assert world.table.memory_used_bytes == 100, "what it may need is taken from the start"
    world.loader.gate.set()
    await loading
    assert world.loader.thread.started and held.status().state == stage_pb2.LOADED
    assert world.table.memory_used_bytes == 80


async def test_a_stage_of_the_same_or_an_older_epoch_is_refused(world: World) -> None:
    await world.load(epoch=3)
    for epoch in (2, 3):
        with pytest.raises(AlreadyExists, match="holds stage 0 of 'pipe', epoch 3"):
            await world.load(epoch=epoch)
    await world.load(epoch=4)
    await world.load(index=1, stage_count=2)
    assert len(world.table) == 3


async def test_a_stage_that_is_still_loading_counts_as_held(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    with pytest.raises(AlreadyExists):
        await world.load()
    world.loader.gate.set()
    await loading


@pytest.mark.parametrize("fields", [{"pipeline_id": ""}, {"epoch": 0}, {"index": 1}, {"stage_count": 0}])
async def test_a_request_without_a_place_is_refused(world: World, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await world.load(**fields)
    assert not len(world.table)


async def test_unencrypted_channels_need_the_workers_consent(world: World) -> None:
    with pytest.raises(InvalidRequest, match="--allow-insecure-tensors"):
        await world.load(insecure_tensors=True)


async def test_too_little_memory_names_needed_and_free_bytes(world: World) -> None:
    world.loader.needed_bytes = 900
    loading = world.start_load()
    await world.loader.arrived.wait()
    world.loader.needed_bytes = 101
    with pytest.raises(NotEnoughMemory, match="needs 101 bytes, and worker w1 has 100 free"):
        await world.load(pipeline_id="other")
    assert world.loader.plans[-1].closed and len(world.table) == 1
    world.loader.gate.set()
    await loading


async def test_what_the_loader_refuses_leaves_nothing(world: World) -> None:
    world.loader.error = NotFound("no such file")
    with pytest.raises(NotFound, match="no such file"):
        await world.load()
    assert not len(world.table) and world.table.memory_used_bytes == 0


async def test_a_load_whose_caller_leaves_gives_everything_back(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    loading.cancel()
    await asyncio.sleep(0)
    assert [held.status().state for held in world.table] == [stage_pb2.UNLOADING]
    world.loader.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not len(world.table) and not world.loader.made and world.loader.plans[0].closed


async def test_a_load_that_is_cancelled_twice_is_held_until_it_is_given_back(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    for _ in range(2):
        loading.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert [held.state for held in world.table] == [stage_pb2.UNLOADING]
    world.loader.gate.set()
    assert await world.table.unload("p") == 1
    assert not len(world.table) and world.loader.plans[0].closed


async def test_a_load_whose_caller_leaves_while_the_file_is_opened_closes_it(world: World) -> None:
    loading = asyncio.create_task(world.load())
    while not len(world.table):
        await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert all(plan.closed for plan in world.loader.plans) and not len(world.table)


async def test_unloading_a_stage_that_loads_waits_until_all_of_it_is_given_back(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    unloading = asyncio.create_task(world.table.unload("p"))
    await asyncio.sleep(0)
    assert not unloading.done() and world.table.memory_used_bytes == 100
    world.loader.gate.set()
    assert await unloading == 1
    assert not len(world.table)
    with pytest.raises(LoadCancelled):
        await loading


async def test_a_stage_that_is_unloaded_the_moment_it_is_loaded_never_starts(world: World) -> None:
    unloading: list[asyncio.Task[int]] = []

    async def unload() -> None:
        unloading.append(asyncio.create_task(world.table.unload("p")))
        (held,) = world.table
        while not held.unloading:
            await asyncio.sleep(0)

    world.loader.before_it_is_known = unload
    with pytest.raises(LoadCancelled):
        await world.load()
    assert await unloading[0] == 1
    assert world.loader.thread.discarded and not world.loader.thread.started and not len(world.table)


async def test_unloading_chooses_by_index_and_epoch(world: World) -> None:
    for index in (0, 1):
        for epoch in (1, 2):
            await world.load(index=index, epoch=epoch, stage_count=2)
    assert await world.table.unload("other") == 0
    assert await world.table.unload("p", 1, 1) == 1
    assert await world.table.unload("p", None, 1) == 1
    assert sorted(held.key[1:] for held in world.table) == [(0, 2), (1, 2)]
    assert await world.table.unload("p") == 2 and not len(world.table)


async def test_what_runs_at_an_unloaded_head_is_told_and_so_are_its_followers(world: World) -> None:
    await world.load()
    await world.table.unload("p")
    assert world.loader.thread.posted == [Stop("the pipeline was undeployed")]
    head = world.loader.made[-1].head
    assert head is not None and head.closed


async def test_connecting_speaks_to_the_stage_of_that_epoch(world: World) -> None:
    with pytest.raises(NotFound):
        await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=1))
    await world.load(epoch=2)
    with pytest.raises(StaleEpoch, match="of epoch 2, not 1"):
        await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=1))
    await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=2, allowed_keys=["k"]))
    (command,) = world.loader.thread.posted
    assert isinstance(command, Connect) and command.next is None and command.allowed == {"k"}


async def test_a_stage_that_loads_or_unloads_is_not_connected(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    connect = stage_pb2.ConnectRequest(pipeline_id="p", epoch=1)
    with pytest.raises(NotReady, match="still loading"):
        await world.table.connect(connect)
    world.loader.gate.set()
    await loading
    world.loader.thread.may_end.clear()
    unloading = asyncio.create_task(world.table.unload("p"))
    (held,) = world.table
    while not held.unloading:
        await asyncio.sleep(0)
    with pytest.raises(NotReady, match="being unloaded"):
        await world.table.connect(connect)
    world.loader.thread.may_end.set()
    await unloading


async def test_a_stage_that_three_answers_do_not_want_is_unloaded(world: World) -> None:
    await world.load()
    for _ in range(UNWANTED_ANSWERS - 1):
        await world.table.follow([])
    await world.table.follow([wanted()])
    for _ in range(UNWANTED_ANSWERS - 1):
        await world.table.follow([wanted(epoch=2)])
    assert len(world.table) == 1
    await world.table.follow([])
    assert not len(world.table)


async def test_a_degraded_pipelines_stages_are_told_once(world: World) -> None:
    await world.load()
    await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=1))
    await world.table.follow([wanted(degraded=False)])
    await world.table.follow([wanted(degraded=True)])
    world.loader.thread.state = stage_pb2.BROKEN
    await world.table.follow([wanted(degraded=True)])
    assert [type(each) for each in world.loader.thread.posted] == [Connect, Degrade]


async def test_what_a_degraded_or_closing_pipeline_is_told_says_why(world: World) -> None:
    await world.load()
    await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=1))
    (head,) = [held.head for held in world.table]
    want = wanted()
    want.closing, want.reason = True, "worker w2 is about to end"
    await world.table.follow([want])
    assert cast(Any, head).shut_for == "worker w2 is about to end; try again soon"
    await world.table.follow([wanted()])
    assert cast(Any, head).shut_for == ""
    want.closing, want.degraded, want.reason = False, True, "stage 1 of 3 on worker w2 is gone: its process is gone"
    await world.table.follow([want])
    assert world.loader.thread.posted[-1] == Degrade(want.reason)


async def test_a_stage_takes_no_neighbours_of_an_earlier_round(world: World) -> None:
    await world.load()
    world.loader.thread.round = 3
    with pytest.raises(StaleEpoch, match="connected in round 3, not 2"):
        await world.table.connect(stage_pb2.ConnectRequest(pipeline_id="p", epoch=1, round=2))


async def test_sequences_of_an_unloaded_stage_are_told_the_callers_reason(world: World) -> None:
    await world.load()
    await world.table.unload("p", reason="the pipeline was rebalanced")
    assert world.loader.thread.posted[-1] == Stop("the pipeline was rebalanced")


async def test_the_head_is_found_by_name_or_id_once_it_is_loaded(world: World) -> None:
    with pytest.raises(NotFound):
        world.table.find_head("pipe")
    loading = world.start_load()
    await world.loader.arrived.wait()
    with pytest.raises(NotReady, match="still loading"):
        world.table.find_head("pipe")
    world.loader.gate.set()
    await loading
    head: Any = world.loader.made[-1].head
    assert world.table.find_head("pipe") is head and world.table.find_head("p") is head


async def test_a_worker_that_drains_waits_for_all_sequences_and_takes_nothing_new(world: World) -> None:
    await world.load()
    head, thread = world.loader.made[-1].head, world.loader.thread
    await world.load(pipeline_id="q", index=1, stage_count=2)
    world.loader.made[-1].head = None  # what is not a head knows of open sequences only
    assert head is not None
    head.live, world.loader.thread.sequences = 1, 1
    draining = asyncio.create_task(world.table.drain())
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="about to end"):
        await world.load(pipeline_id="r")
    with pytest.raises(Unavailable, match="about to end"):
        world.table.find_head("pipe")
    head.live = 0
    await asyncio.sleep(0.05)
    assert not draining.done()
    world.loader.thread.sequences = 0
    await asyncio.wait_for(draining, 5)
    await world.table.close()
    assert not len(world.table) and thread.posted == [Stop("worker w1 has ended")]


async def test_a_worker_that_drains_ends_its_loads_at_once_and_says_why(world: World) -> None:
    loading = world.start_load()
    await world.loader.arrived.wait()
    draining = asyncio.create_task(world.table.drain())
    await asyncio.sleep(0)
    assert [held.state for held in world.table] == [stage_pb2.UNLOADING]
    world.loader.gate.set()
    with pytest.raises(Unavailable, match="worker w1 is about to end"):
        await loading
    await draining
    assert not len(world.table)


async def test_a_stage_whose_thread_cannot_be_started_leaves_nothing(world: World) -> None:
    async def forbid_threads() -> None:
        world.loader.thread.start_error = NotReady("can't start new thread: raise the limit")

    world.loader.before_it_is_known = forbid_threads
    with pytest.raises(NotReady, match="raise the limit"):
        await world.load()
    assert not len(world.table) and world.loader.thread.discarded
