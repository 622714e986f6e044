"""What every transport does alike with frames: order, sizes, waiting, back-pressure, limits, tidiness."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest

from eldric.transport.base import Peer, Transport
from eldric.transport.errors import (
    ConnectFailed,
    CorruptFrame,
    InvalidAddress,
    ListenFailed,
    QueueFull,
    TransportClosed,
)
from eldric.transport.frame import FrameDtype, FrameKind, Header, Run
from tests.transports import EVERY_TRANSPORT, QUICK, SHORT, fill, linked, make_transport, numbered, peer_of, receive

pytestmark = pytest.mark.parametrize("scheme", EVERY_TRANSPORT)


@pytest.fixture(autouse=True)
def ucx_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By TCP; the other files of this suite take shared memory."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def test_frames_arrive_whole_and_in_order(scheme: str) -> None:
    hidden = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    with linked(scheme) as (_, link, receiver):
        for step in range(1, 6):
            header = Header(
                kind=FrameKind.HIDDEN,
                step=step,
                lane=1,
                dtype=FrameDtype.F32,
                shape=hidden.shape,
                runs=(Run(0, step, 4, False), Run(3, 9, 2, True)),
            )
            link.send(header, hidden * step)
        for step in range(1, 6):
            frame = receive(receiver)
            assert (frame.header.step, frame.header.serial) == (step, step)
            assert (frame.header.pipeline_id, frame.header.epoch, frame.header.from_stage) == ("pipeline-1", 1, 0)
            assert frame.header.runs == (Run(0, step, 4, False), Run(3, 9, 2, True))
            assert np.array_equal(frame.array(), hidden * step)


def test_encryption_is_optional(scheme: str) -> None:
    with linked(scheme, replace(QUICK, encrypt=False)) as (sender, link, receiver):
        assert (sender.public_key, receiver.public_key) == ("", "")
        link.send(numbered(1), b"plain")
        assert receive(receiver).payload.tobytes() == b"plain"


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 16 * 1024 * 1024])
def test_payloads_of_any_size(scheme: str, size: int) -> None:
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    with linked(scheme) as (_, link, receiver):
        link.send(numbered(1), payload)
        link.send(numbered(2), payload)
        for number in (1, 2):
            frame = receive(receiver)
            assert frame.header.step == number
            assert np.array_equal(np.frombuffer(frame.payload, np.uint8), payload)


def test_stream_of_large_frames_arrives(scheme: str) -> None:
    payload = bytes(2 * 1024 * 1024)
    with linked(scheme) as (_, link, receiver), ThreadPoolExecutor(1) as pool:

        def send_all() -> None:
            for number in range(16):
                link.send(numbered(number), payload, timeout=10)

        sending = pool.submit(send_all)
        assert [receive(receiver, 10).header.step for _ in range(16)] == list(range(16))
        sending.result(timeout=5)


def test_sent_memory_may_be_used_again(scheme: str) -> None:
    hidden = np.ones(200_000, np.uint8)
    with linked(scheme) as (_, link, receiver):
        for number in range(4):
            hidden[:] = number
            link.send(numbered(number), hidden)
        hidden[:] = 99
        for number in range(4):
            assert set(receive(receiver).payload.tobytes()) == {number}


def test_received_payload_outlives_later_frames_and_the_transport(scheme: str) -> None:
    with linked(scheme) as (_, link, receiver):
        payloads = []
        for number in range(6):
            link.send(numbered(number), bytes([number]) * 100_000)
            payloads.append(receive(receiver).payload)
    assert [set(payload.tobytes()) for payload in payloads] == [{number} for number in range(6)]


def test_recv_waits_no_longer_than_its_timeout(scheme: str) -> None:
    with make_transport(scheme, 0) as transport:
        assert transport.recv(0) is None
        began = time.monotonic()
        assert transport.recv(0.1) is None
        assert 0.09 < time.monotonic() - began < 1


def test_wake_ends_a_recv_that_waits(scheme: str) -> None:
    with make_transport(scheme, 0) as transport, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(transport.recv, None)
        transport.wake()
        assert waiting.result(timeout=5) is None


def test_wake_before_recv_is_not_lost_and_many_merge(scheme: str) -> None:
    with make_transport(scheme, 0) as transport:
        for _ in range(5000):
            transport.wake()
        began = time.monotonic()
        assert transport.recv(5) is None
        assert time.monotonic() - began < 1
        while transport.recv(0) is not None:
            pass
        began = time.monotonic()
        assert transport.recv(SHORT) is None
        assert time.monotonic() - began >= SHORT * 0.9  # nothing is left of the 5000


def test_wake_loses_no_frame(scheme: str) -> None:
    with linked(scheme) as (_, link, receiver):
        got: list[int] = []
        for number in range(50):
            link.send(numbered(number))
            receiver.wake()
            while len(got) <= number:
                if (frame := receiver.recv(5)) is not None:
                    got.append(frame.header.step)
        assert got == list(range(50))


def test_full_queue_blocks_then_raises_and_goes_on(scheme: str) -> None:
    with linked(scheme, replace(QUICK, queue_frames=16)) as (_, link, receiver):
        assert receiver.recv(SHORT) is None  # says hello, so that the receiver's own bound holds
        assert fill(link) == 16
        with pytest.raises(QueueFull, match="stage 1 took no frame"):
            link.send(numbered(99), timeout=0)
        for number in range(16):
            assert receive(receiver).header.step == number
        link.send(numbered(100), timeout=1)
        frame = receive(receiver)
        assert frame.header.step == 100


def test_large_frames_are_bounded_by_their_bytes(scheme: str) -> None:
    with linked(scheme, replace(QUICK, queue_bytes=1_000_000)) as (_, link, receiver):
        assert receiver.recv(SHORT) is None
        for number in range(2):
            link.send(numbered(number), bytes(600_000), timeout=0.2)
        with pytest.raises(QueueFull):
            link.send(numbered(2), bytes(10), timeout=0.1)
        assert receive(receiver).header.step == 0
        link.send(numbered(3), bytes(10), timeout=1)


def test_blocked_sender_goes_on_when_the_receiver_takes(scheme: str) -> None:
    with linked(scheme, replace(QUICK, queue_frames=4)) as (_, link, receiver), ThreadPoolExecutor(1) as pool:

        def send_all() -> None:
            for number in range(200):
                link.send(numbered(number), timeout=5)

        sending = pool.submit(send_all)
        assert [receive(receiver).header.step for _ in range(200)] == list(range(200))
        sending.result(timeout=5)


def test_receiver_that_is_busy_is_not_taken_for_dead(scheme: str) -> None:
    """Its queue is full and it takes nothing for far longer than silence_s: a long prefill step."""
    with linked(scheme, replace(QUICK, silence_s=0.3, queue_frames=8)) as (sender, link, receiver):
        assert receiver.recv(SHORT) is None
        sent = fill(link)
        assert sender.recv(1.0) is None  # would raise PeerLost
        for number in range(sent):
            assert receive(receiver).header.step == number
        link.send(numbered(0))
        assert receive(receiver).header.step == 0


def test_frame_that_a_peer_would_drop_is_not_sent(scheme: str) -> None:
    with linked(scheme, replace(QUICK, max_payload_bytes=1000)) as (_, link, receiver):
        for header, payload in (
            (numbered(1), bytes(1001)),
            (Header(kind=FrameKind.HIDDEN, dtype=FrameDtype.F32, shape=(1, 4), runs=(Run(0, 0, 1, True),)), bytes(15)),
            (numbered(1), np.ones((10, 10), np.uint8)[:, ::2]),
        ):
            with pytest.raises(CorruptFrame):
                link.send(header, payload)
        link.send(numbered(2), bytes(1000))
        assert receive(receiver).header.step == 2


def test_nothing_is_sent_before_an_epoch_is_set(scheme: str) -> None:
    with make_transport(scheme, 1) as receiver:
        sender = type(receiver)("pipeline-1", 0, QUICK)
        with sender:
            receiver.allow([sender.public_key])
            link = sender.connect(peer_of(receiver, receiver.listen()))
            with pytest.raises(CorruptFrame, match="no epoch"):
                link.send(numbered(1))


def test_address_in_use_or_malformed_is_an_error(scheme: str) -> None:
    with make_transport(scheme, 0) as first, make_transport(scheme, 1) as second:
        address = first.listen()
        with pytest.raises(ListenFailed):
            second.listen("127.0.0.1", int(address.rpartition(":")[2]))
        with pytest.raises(InvalidAddress):
            second.connect(peer_of(first, "smoke://127.0.0.1:1"))


def test_stats_count_what_was_sent_and_taken(scheme: str) -> None:
    with linked(scheme) as (_, link, receiver):
        for number in range(6):
            link.send(numbered(number), bytes(10))
        assert (link.stats.frames, link.stats.bytes) == (6, 60)
        assert (link.stats.queue_frames, link.stats.queue_bytes) == (6, 60)
        for _ in range(6):
            receive(receiver)
        assert (receiver.stats.frames, receiver.stats.bytes, receiver.stats.peers) == (6, 60, 1)
        assert sum(receiver.stats.dropped.values()) == 0


def test_closed_transport_says_so_and_closes_again(scheme: str) -> None:
    transport = make_transport(scheme, 0)
    peer = peer_of(transport, transport.listen())
    transport.close()
    transport.close()
    transport.wake()
    for call in (lambda: transport.recv(0), transport.listen, lambda: transport.connect(peer)):
        with pytest.raises(TransportClosed):
            call()


def test_ring_of_three_passes_a_frame_around(scheme: str) -> None:
    stages = [make_transport(scheme, stage) for stage in range(3)]
    peers = [peer_of(stage, stage.listen()) for stage in stages]
    for index, stage in enumerate(stages):
        stage.allow([stages[index - 1].public_key])
    threads = [threading.Thread(target=pass_on, args=(stage, peers[(stage.stage + 1) % 3])) for stage in stages[1:]]
    for thread in threads:
        thread.start()
    link = stages[0].connect(peers[1])
    for step in range(1, 101):
        link.send(numbered(step), b"x" * step)
        frame = receive(stages[0])
        assert (frame.header.step, frame.header.from_stage, frame.payload.nbytes) == (step, 2, step)
    for stage in stages:
        stage.wake()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    for stage in stages:
        stage.close()


def pass_on(stage: Transport, peer: Peer) -> None:
    """A stage's thread: what comes goes on, until a wake."""
    link = stage.connect(peer)
    while (frame := stage.recv(10)) is not None:
        link.send(frame.header, frame.payload)


def test_nothing_is_left_behind(scheme: str) -> None:
    def belongings() -> tuple[int, int, int]:
        process = psutil.Process()
        return process.num_threads(), process.num_fds(), len(process.net_connections())

    with linked(scheme):
        pass  # what is made once for the process
    before, deadline = belongings(), time.monotonic() + 5
    time.sleep(0.1)
    while (now := belongings()) != before and time.monotonic() < deadline:  # the kernel counts a thread for a moment
        before = now  # after it was joined
        time.sleep(0.1)
    for _ in range(5):
        with linked(scheme) as (_, link, receiver):
            link.send(numbered(1), bytes(100_000))
            receive(receiver)
            with make_transport(scheme, 2) as stranger, pytest.raises(ConnectFailed):
                stranger.connect(peer_of(receiver, receiver.listen()), timeout=0.05)
    deadline = time.monotonic() + 5
    while belongings() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert belongings() == before
