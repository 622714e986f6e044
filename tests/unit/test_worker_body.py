"""The compute thread of a stage behind the head, between made-up neighbours."""

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from eldric.engine.errors import InvalidStep
from eldric.engine.step import StepInput
from eldric.transport.base import LinkStats, Peer, TransportStats
from eldric.transport.errors import ConnectFailed, PeerLost
from eldric.transport.frame import Frame, FrameDtype, FrameKind, Header, Payload, Run
from eldric.v1 import frame_pb2, stage_pb2
from eldric.worker.body_thread import BodyThread
from eldric.worker.commands import Connect, Degrade, Stop
from eldric.worker.compute_thread import Place

pytestmark = pytest.mark.timeout(10)

HIDDEN = 4
NEXT = Peer("zmq://next:1", "key", 2)


class FakeLink:
    def __init__(self) -> None:
        self.closed: str | None = None
        self.sent: queue.SimpleQueue[tuple[Header, bytes]] = queue.SimpleQueue()
        self.stats = LinkStats(frames=0, bytes=0, queue_frames=0, queue_bytes=0)

    def send(self, header: Header, payload: Payload = b"", timeout: float | None = None) -> None:
        self.sent.put((header, bytes(memoryview(payload))))  # type: ignore[arg-type]


class FakeTransport:
    """Gives out what a test put in: frames, ends of neighbours, wakes (None)."""

    scheme = "fake"

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Frame | Exception | None] = queue.SimpleQueue()
        self.links: list[FakeLink] = []
        self.epochs: list[int] = []
        self.stats = TransportStats(refused=2, dropped={"corrupt": 1})
        self.unreachable = False
        self.closed = False

    def allow(self, keys: Any) -> None:
        pass

    def settle(self, ask: bool) -> None:
        pass

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def connect(self, peer: Peer, timeout: float) -> FakeLink:
        if self.unreachable:
            raise ConnectFailed("nobody there")
        self.links.append(FakeLink())
        return self.links[-1]

    def recv(self, timeout: float | None = None) -> Frame | None:
        try:
            got = self.inbox.get(timeout=timeout) if timeout else self.inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(got, Exception):
            raise got
        return got

    def wake(self) -> None:
        self.inbox.put(None)

    def close(self) -> None:
        self.closed = True


class FakeStage:
    """Adds one to what it gets."""

    spec = SimpleNamespace(vocab_size=8)
    compute_ns = 0

    def __init__(self) -> None:
        self.truncated: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.closed = False

    def truncate(self, slot: int, position: int) -> None:
        if slot >= 4:
            raise InvalidStep(f"slot {slot} is not among the 4 slots")
        self.truncated.append((slot, position))

    def compute(self, step: StepInput) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        assert step.hidden is not None
        self.compute_ns += 2_000
        return SimpleNamespace(hidden=step.hidden + 1, logits=None)

    def close(self) -> None:
        self.closed = True


class World:
    def __init__(self) -> None:
        self.transport, self.stage = FakeTransport(), FakeStage()
        self.states: queue.SimpleQueue[stage_pb2.StageState.ValueType] = queue.SimpleQueue()
        place = Place("p", 1, 1, 3)
        self.stood_still_s = 0.0
        self.thread = BodyThread(
            cast(Any, self.stage),
            cast(Any, self.transport),
            place,
            lambda: self.states.put(self.thread.state),
            lambda: self.stood_still_s,
        )
        self.thread.start()

    def connect(self, round: int = 0) -> FakeLink:
        """Connected once this returns."""
        command = Connect(1, NEXT, frozenset({"before"}), ("w0", "w1", "w2"), round)
        self.thread.post(command)
        command.done.result(5)
        assert self.states.get(timeout=5) == stage_pb2.SERVING
        return self.transport.links[-1]

    def lose(self, *, inbound: bool) -> None:
        self.transport.inbox.put(PeerLost(0 if inbound else 2, "its process died", inbound=inbound))

    def step(self, number: int) -> None:
        rows = np.full((1, HIDDEN), number, np.float32)
        header = Header(
            kind=FrameKind.HIDDEN, step=number, dtype=FrameDtype.F32, shape=rows.shape, runs=(Run(0, number, 1, True),)
        )
        self.transport.inbox.put(Frame(header, memoryview(rows.tobytes())))

    def control(self, kind: FrameKind, message: Any) -> None:
        self.transport.inbox.put(Frame(Header(kind=kind), memoryview(message.SerializeToString())))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.thread.post(Stop("the test is over"))
    assert made.thread.join(5)
    assert made.transport.closed and made.stage.closed


def sent(link: FakeLink) -> tuple[Header, bytes]:
    return link.sent.get(timeout=5)


def test_a_step_goes_on_to_the_next_stage(world: World) -> None:
    link = world.connect()
    world.step(3)
    header, payload = sent(link)
    assert (header.step, header.runs) == (3, (Run(0, 3, 1, True),))
    assert np.frombuffer(payload, np.float32).tolist() == [4.0] * HIDDEN
    assert (world.thread.steps, world.thread.refused_links) == (1, 2)
    assert world.thread.dropped_frames == {"corrupt": 1} and world.thread.step_ms == 0.002


def test_a_step_that_cannot_be_computed_is_answered_and_the_stage_goes_on(world: World) -> None:
    link = world.connect()
    world.stage.error = InvalidStep("no such slot")
    world.step(3)
    header, payload = sent(link)
    error = frame_pb2.StepTokens.FromString(payload).error
    assert (header.kind, header.step) == (FrameKind.TOKENS, 3)
    assert (error.stage, error.status, error.message) == (1, "INVALID_ARGUMENT", "no such slot")
    world.stage.error = None
    world.step(4)
    assert sent(link)[0].kind is FrameKind.HIDDEN


def test_sequences_are_counted_from_open_to_close(world: World) -> None:
    link = world.connect()
    for slot in (0, 2):
        world.control(FrameKind.OPEN, frame_pb2.SequenceOpen(slot=slot))
        assert sent(link)[0].kind is FrameKind.OPEN
    assert world.thread.sequences == 2
    world.control(FrameKind.CLOSE, frame_pb2.SequenceClose(slot=2))
    assert sent(link)[0].kind is FrameKind.CLOSE
    assert world.thread.sequences == 1 and world.stage.truncated[-1] == (2, 0)


def test_a_lost_neighbour_breaks_the_stage_and_ends_its_sequences(world: World) -> None:
    link = world.connect()
    world.control(FrameKind.OPEN, frame_pb2.SequenceOpen(slot=0))
    sent(link)
    world.lose(inbound=True)
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    assert world.thread.message == "stage 0 of 3 on worker w0 is gone: its process died"
    while world.thread.sequences:
        pass


def test_a_stage_that_stood_still_does_not_blame_its_neighbours(world: World) -> None:
    world.connect()
    world.stood_still_s = 4.96
    world.lose(inbound=True)
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    assert world.thread.message == "stage 1 of 3 on worker w1 stood still for 5.0 s and was taken for gone"


def test_a_stage_that_is_told_nonsense_says_what_and_goes_on_once_it_is_mended(world: World) -> None:
    world.connect()
    world.control(FrameKind.OPEN, frame_pb2.SequenceOpen(slot=4095))
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    assert world.thread.message == "it was told what it cannot do: slot 4095 is not among the 4 slots"
    link = world.connect(round=1)
    world.step(3)
    assert sent(link)[0].step == 3


def test_the_loss_of_both_neighbours_does_not_break_a_mended_stage_again(world: World) -> None:
    link = world.connect()
    link.closed = "its peer is gone"
    world.lose(inbound=False)
    world.lose(inbound=True)
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    link = world.connect()
    world.step(3)
    assert sent(link)[0].step == 3
    assert world.states.empty() and world.thread.state == stage_pb2.SERVING


def test_frames_that_were_under_way_when_a_stage_broke_are_not_taken_once_it_is_mended(world: World) -> None:
    link = world.connect()
    link.closed = "its peer is gone"
    world.lose(inbound=False)
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    world.control(FrameKind.OPEN, frame_pb2.SequenceOpen(slot=0))
    world.step(3)
    while not world.transport.inbox.empty():
        pass
    link = world.connect(round=1)
    world.step(5)
    assert sent(link)[0].step == 5
    assert world.thread.sequences == 0
    assert world.transport.epochs == [1 << 32, 1 << 32 | 1]


def test_the_late_end_of_a_link_that_was_replaced_is_nothing(world: World) -> None:
    old = world.connect()
    new = world.connect()
    old.closed = "its peer is gone"
    world.lose(inbound=False)
    world.step(3)
    assert sent(new)[0].step == 3 and world.states.empty()


def test_a_next_stage_that_is_not_there_breaks_the_stage(world: World) -> None:
    world.transport.unreachable = True
    command = Connect(1, NEXT, frozenset())
    world.thread.post(command)
    world.thread.post(Degrade("another stage is lost"))  # so that it does not try for long
    with pytest.raises(ConnectFailed):
        command.done.result(5)
    assert world.states.get(timeout=5) == stage_pb2.BROKEN
    assert "cannot reach the next stage: nobody there" in world.thread.message


def test_a_connect_that_nobody_waits_for_any_more_is_left_out(world: World) -> None:
    gone = Connect(1, NEXT, frozenset())
    assert gone.done.cancel()
    world.thread.post(gone)
    world.connect()
    assert len(world.transport.links) == 1


def test_a_stage_that_is_idle_stops_at_once() -> None:
    for _ in range(20):
        world = World()
        world.thread.post(Stop("the test is over"))
        assert world.thread.join(0.5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage-")]
