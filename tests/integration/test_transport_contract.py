"""What every transport does alike: the contract of eldric.transport.base."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import numpy as np
import psutil
import pytest

from eldric.transport.base import Link, Peer, Transport
from eldric.transport.errors import (
    ConnectFailed,
    CorruptFrame,
    InvalidAddress,
    LinkClosed,
    ListenFailed,
    PeerLost,
    QueueFull,
    TransportClosed,
)
from eldric.transport.frame import FrameDtype, FrameKind, Header, Run
from tests.transports import QUICK, linked, make_transport, numbered, peer_of, receive

pytestmark = pytest.mark.parametrize("scheme", ["zmq", "inproc"])

SHORT = 0.05  # seconds in which nothing is expected to happen


def fill(link: Link, header: Callable[[int], Header] = numbered) -> int:
    """Send until the queue is full; gives how many frames went."""
    for number in count():
        try:
            link.send(header(number), b"", timeout=0.2)
        except QueueFull:
            return number
    raise AssertionError


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


def test_closed_sender_is_lost_after_its_frames(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        for number in range(5):
            link.send(numbered(number), bytes(50_000))
        key = sender.public_key
        sender.close()
        assert [receive(receiver).header.step for _ in range(5)] == list(range(5))
        with pytest.raises(PeerLost) as lost:
            receiver.recv(5)
        assert (lost.value.stage, lost.value.inbound, lost.value.public_key) == (0, True, key)
        assert receiver.recv(SHORT) is None  # reported once
        assert receiver.stats.peers == 0


def test_closed_receiver_is_lost_and_its_link_dead(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        key = receiver.public_key
        receiver.close()
        with pytest.raises(PeerLost) as lost:
            sender.recv(5)
        assert (lost.value.stage, lost.value.inbound, lost.value.public_key) == (1, False, key)
        assert sender.recv(SHORT) is None
        with pytest.raises(LinkClosed, match="stage 1"):
            link.send(numbered(1), timeout=5)
        assert link.closed is not None


def test_sender_blocked_at_a_full_queue_learns_of_the_loss(scheme: str) -> None:
    with linked(scheme, replace(QUICK, queue_frames=8)) as (_, link, receiver), ThreadPoolExecutor(1) as pool:
        fill(link)
        blocked = pool.submit(link.send, numbered(99), b"", 10)
        receiver.close()
        began = time.monotonic()
        with pytest.raises(LinkClosed):
            blocked.result(timeout=10)
        assert time.monotonic() - began < 1


def test_closed_link_sends_nothing_more(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        link.send(numbered(1))
        link.close()
        link.close()
        with pytest.raises(LinkClosed, match="closed by this end"):
            link.send(numbered(2))
        assert receive(receiver).header.step == 1
        with pytest.raises(PeerLost):
            receiver.recv(5)
        assert sender.recv(SHORT) is None  # its own doing is no loss


def test_new_link_after_a_closed_one_works(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        for number in range(3):
            link = sender.connect(peer)
            link.send(numbered(number))
            assert receive(receiver).header.step == number
            link.close()
            with pytest.raises(PeerLost):
                receiver.recv(5)


def test_good_link_to_the_same_peer_is_given_again(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        link = sender.connect(peer)
        assert sender.connect(peer) is link
        link.close()
        assert sender.connect(peer) is not link


def test_peer_that_is_not_allowed_gets_nowhere(scheme: str) -> None:
    with make_transport(scheme, 0) as stranger, make_transport(scheme, 1) as receiver:
        address = receiver.listen()
        with pytest.raises(ConnectFailed, match="does not allow this transport's key"):
            stranger.connect(peer_of(receiver, address), timeout=0.3)
        receiver.allow(["another key"])
        with pytest.raises(ConnectFailed, match="does not allow this transport's key"):
            stranger.connect(peer_of(receiver, address), timeout=0.3)
        assert receiver.recv(SHORT) is None
        assert receiver.stats.peers == 0


def test_peer_with_another_key_than_the_pinned_one_is_not_spoken_to(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as impostor, make_transport(scheme, 1) as real:
        impostor.allow([sender.public_key])
        address = impostor.listen()
        with pytest.raises(ConnectFailed, match="does not hold the expected key"):
            sender.connect(peer_of(real, address), timeout=0.3)
        assert impostor.recv(SHORT) is None


def test_connect_waits_for_a_peer_that_comes_late(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver, ThreadPoolExecutor(1) as pool:
        address = receiver.listen()
        connecting = pool.submit(sender.connect, peer_of(receiver, address), 10)
        with pytest.raises(TimeoutError):
            connecting.result(timeout=0.2)
        receiver.allow([sender.public_key])  # from another thread than the one that connects
        connecting.result(timeout=5).send(numbered(1))
        assert receive(receiver).header.step == 1


def test_nobody_at_the_address_is_said(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as gone:
        address = gone.listen()
        peer = peer_of(gone, address)
        gone.close()
        with pytest.raises(ConnectFailed, match=r"stage 1 at .* nobody listens there"):
            sender.connect(peer, timeout=0.3)


def test_key_that_is_not_allowed_any_more_is_cut_off(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        link.send(numbered(1))
        assert receive(receiver).header.step == 1
        receiver.allow([])
        link.send(numbered(2))
        assert receiver.recv(0.2) is None
        assert receiver.stats.dropped["unknown_peer"] == 1
        sender.close()
        assert receiver.recv(0.2) is None  # and its end is nobody's business


def test_link_of_another_pipeline_is_refused(scheme: str) -> None:
    with make_transport(scheme, 0, pipeline="another") as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        link = sender.connect(peer_of(receiver, receiver.listen()))
        assert receiver.recv(SHORT) is None
        with pytest.raises(LinkClosed, match="refused the link: pipeline 'another'"):
            for _ in range(20):
                link.send(numbered(1), timeout=1)
        assert receiver.recv(SHORT) is None
        assert receiver.stats.refused == 1


def test_stale_epoch_is_dropped_and_a_newer_one_waits(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        receiver.set_epoch(2)
        link.send(numbered(1))
        assert receiver.recv(0.2) is None
        assert receiver.stats.dropped["stale_epoch"] == 1
        sender.set_epoch(3)
        link.send(numbered(2))
        assert receiver.recv(0.2) is None
        receiver.set_epoch(3)
        link.send(numbered(3))
        assert [receive(receiver).header.step, receive(receiver).header.step] == [2, 3]


def test_end_of_a_neighbour_that_left_the_ring_is_not_reported(scheme: str) -> None:
    with linked(scheme) as (first, _, leaving), make_transport(scheme, 2) as last:
        last.allow([first.public_key])
        first.set_epoch(2)
        link = first.connect(peer_of(last, last.listen()))
        leaving.close()
        assert first.recv(0.2) is None
        last.set_epoch(2)
        link.send(numbered(1))
        assert receive(last).header.step == 1


def test_link_of_an_older_epoch_may_end_unnoticed(scheme: str) -> None:
    with linked(scheme) as (sender, _, receiver):
        assert receiver.recv(SHORT) is None
        receiver.set_epoch(2)
        sender.close()
        assert receiver.recv(0.2) is None
        assert receiver.stats.peers == 0


def test_link_that_goes_on_in_a_new_epoch_is_missed_when_it_ends(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        link = sender.connect(peer)
        for epoch in (2, 3, 4):
            receiver.set_epoch(epoch)
            sender.set_epoch(epoch)
            assert sender.connect(peer) is link
            assert receiver.recv(SHORT) is None
        link.send(numbered(1))
        assert receive(receiver).header.epoch == 4
        sender.close()
        with pytest.raises(PeerLost):
            receiver.recv(5)


def test_loss_in_an_epoch_that_is_still_to_come_waits_for_it(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        sender.set_epoch(2)
        sender.connect(peer_of(receiver, receiver.listen())).send(numbered(1))
        sender.close()
        assert receiver.recv(0.2) is None
        receiver.set_epoch(2)
        assert receive(receiver).header.step == 1
        with pytest.raises(PeerLost):
            receiver.recv(5)


def test_link_that_no_epoch_asked_for_is_closed(scheme: str) -> None:
    with linked(scheme) as (sender, link, _):
        sender.set_epoch(2)
        assert link.closed is None  # connect may still ask for it
        sender.set_epoch(3)
        assert link.closed is not None


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
    before = belongings()
    for _ in range(5):
        with linked(scheme) as (_, link, receiver):
            link.send(numbered(1), bytes(100_000))
            receive(receiver)
            with make_transport(scheme, 2) as stranger, pytest.raises(ConnectFailed):
                stranger.connect(peer_of(receiver, receiver.listen()), timeout=0.05)
    assert belongings() == before
