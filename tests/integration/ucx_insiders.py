"""Insiders of ucx who do not keep to its protocol. Each test ends with a good peer whose frame gets through.

Not collected by itself: test_transport_ucx.py runs it, in a process of its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from eldric.transport import ucx_worker
from eldric.transport.base import Peer, TransportOptions
from eldric.transport.errors import ConnectFailed, PeerLost, QueueFull
from eldric.transport.filter import DropReason
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.transport.identity import Identity
from eldric.transport.mailbox import END, FRAME, HELLO, NOTHING
from eldric.transport.opening import open_outbound
from eldric.transport.ucx_mailbox import GRANT, TAG
from eldric.transport.ucx_worker import PREFIX, SMALL_BYTES, Array, Endpoint, Worker
from eldric.v1 import frame_pb2
from tests.doors import GOOD_HELLO, OPTIONS, Target, attacked, header
from tests.transports import SHORT, fill, linked, make_transport, numbered, receive

TAG_NUMBER = 77


@pytest.fixture(params=["tcp", "sm,tcp"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setenv("UCX_TLS", request.param)
    with attacked("ucx") as made:
        yield made


class Insider:
    """A peer whose key is allowed, and its UCX worker."""

    def __init__(self, worker: Worker, endpoint: Endpoint) -> None:
        self.worker, self.endpoint = worker, endpoint

    def say(self, kind: int, header: bytes, payload_bytes: int = 0) -> None:
        self.worker.send(self.endpoint, kind, header, memoryview(bytes(payload_bytes)))

    def say_raw(self, message: bytes, *, as_rest: bool = False) -> None:
        """Anything, under the link's tag, or under the one of payloads that come by themselves."""
        memory = np.frombuffer(message or b"\0", np.uint8)[: len(message)].copy()
        with self.worker.lock:
            tag = self.endpoint.rest_tag if as_rest else self.endpoint.tag
            self.worker.leave([(self.endpoint.handle.tag_send(Array(memory), tag), memory)])


class WithoutAddresses:
    """UCX, in whose worker's address no way is found."""

    UCXError = ucx_worker.libucxx.UCXError

    class UCXAddress:
        @staticmethod
        def create_from_buffer(address: bytes) -> None:
            raise WithoutAddresses.UCXError("Destination is unreachable")


@contextmanager
def insider(target: Target, hello: frame_pb2.LinkHello = GOOD_HELLO) -> Iterator[Insider]:
    identity = target.insider()
    worker = Worker(lambda everything: False)
    talk = target.talk()
    with talk.socket:
        address = TAG.pack(TAG_NUMBER) + worker.address
        accepted, _ = open_outbound(talk, hello, identity, target.receiver.public_key, address, ())
        yield Insider(worker, worker.connect(accepted.address, TAG_NUMBER))
    worker.close()


@pytest.mark.parametrize("case", ["empty", "tag alone", "cut off", "zeros", "newer version"])
def test_link_without_a_worker_to_answer_is_refused(target: Target, case: str) -> None:
    identity, worker = target.insider(), Worker(lambda everything: False)
    good = worker.address
    address = {
        "empty": b"",
        "tag alone": TAG.pack(1),
        "cut off": TAG.pack(1) + good[: len(good) // 3],
        "zeros": TAG.pack(1) + bytes(200),
        "newer version": TAG.pack(1) + bytes([good[0] ^ 0x0F]) + good[1:],
    }[case]
    talk = target.talk()
    with talk.socket:
        open_outbound(talk, GOOD_HELLO, identity, target.receiver.public_key, address, ())
        assert target.receiver.recv(0.1) is None
        talk.socket.settimeout(5)
        while talk.socket.recv(1):  # signs of life, then the end
            pass
    worker.close()


def test_malformed_messages_are_dropped_and_counted(target: Target) -> None:
    with insider(target) as peer:
        messages = [
            b"",
            b"\0",
            bytes((FRAME,)),
            bytes(PREFIX.size),
            PREFIX.pack(FRAME, 2**32 - 1, 2**64 - 1) + bytes(100),
            PREFIX.pack(FRAME, 10, 2**63) + bytes(100),
            PREFIX.pack(GRANT, 0, 0) + bytes(48),
            PREFIX.pack(99, 0, 0) + bytes(48),
        ]
        for message in messages:
            peer.say_raw(message)
        peer.say(HELLO, b"\xff\xff")
        peer.say(HELLO, frame_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, pipeline_id="x").SerializeToString())
        peer.say(HELLO, frame_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, from_stage=1).SerializeToString())
        peer.say(FRAME, b"\xff\xff")
        peer.say(FRAME, bytes(20_000))
        target.dropped(DropReason.CORRUPT, len(messages) + 5)


def test_frames_that_are_not_let_in_are_counted_by_their_reason(target: Target) -> None:
    with insider(target) as peer:
        peer.say(FRAME, header(1))
        assert receive(target.receiver).header.step == 1
        for _ in range(3):
            peer.say(FRAME, header(1))
        target.dropped(DropReason.REPLAYED, 3)
        peer.say(FRAME, header(2, pipeline="another"))
        target.dropped(DropReason.WRONG_PIPELINE, 1)
        peer.say(FRAME, header(3, stage=5))
        target.dropped(DropReason.WRONG_STAGE, 1)
        target.receiver.set_epoch(2)
        peer.say(FRAME, header(4))
        target.dropped(DropReason.STALE_EPOCH, 1)
        target.receiver.set_epoch(1)
        target.receiver.allow([target.good_key])
        peer.say(FRAME, header(5))
        target.dropped(DropReason.UNKNOWN_PEER, 1)


@pytest.mark.parametrize("size", [100_001, 1_000_000, 50_000_000])
def test_oversized_payload_is_not_let_in(target: Target, size: int) -> None:
    with insider(target) as peer:
        peer.say(FRAME, header(1), size)
        target.dropped(DropReason.OVERSIZED if size == 100_001 else DropReason.CORRUPT, 1)


@pytest.mark.parametrize("size", [0, 1, 299_999, 300_001, 2_000_000, 50_000_000])
def test_payload_of_another_length_than_announced_is_dropped(target: Target, size: int) -> None:
    target.receiver._mailbox._max_bytes = 1_000_000  # type: ignore[attr-defined]
    with insider(target) as peer:
        peer.say_raw(PREFIX.pack(FRAME, 0, 300_000) + bytes(48))
        peer.say_raw(bytes(size), as_rest=True)
        target.dropped(DropReason.CORRUPT, 1)
        peer.say(FRAME, header(1))
        assert receive(target.receiver).header.step == 1


def test_message_that_is_too_long_for_its_buffer_is_dropped(target: Target) -> None:
    with insider(target) as peer:
        for size in (SMALL_BYTES + 1, 1_000_000):
            peer.say_raw(PREFIX.pack(FRAME, 0, 0) + bytes(size - PREFIX.size))
        target.dropped(DropReason.CORRUPT, 2)
        peer.say(FRAME, header(1))
        assert receive(target.receiver).header.step == 1


def test_message_that_is_cut_off_is_no_frame_of_before(target: Target) -> None:
    with insider(target) as peer:
        for serial in (1, 2):
            peer.say(FRAME, header(serial))
            assert receive(target.receiver).header.step == serial
            peer.say_raw(PREFIX.pack(FRAME, len(header()), 0)[:-1])
            target.dropped(DropReason.CORRUPT, serial)


def test_what_was_ready_for_a_peer_that_left_is_let_go(target: Target) -> None:
    worker = target.receiver._mailbox.worker  # type: ignore[attr-defined]
    for number in range(1, 6):
        with insider(target) as peer:
            peer.say(FRAME, header(number))
            assert receive(target.receiver).header.step == number
        with pytest.raises(PeerLost):
            target.receiver.recv(5)
    deadline = time.monotonic() + 5
    while any(memory is not None for _, memory in worker._left):
        assert time.monotonic() < deadline, worker._left
        assert target.receiver.recv(0.01) is None
        with worker.lock:
            worker.leave(())


def test_worker_without_a_way_to_itself_bears_a_peer_that_leaves(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    with insider(target) as peer:
        peer.say(FRAME, header(1))
        assert receive(target.receiver).header.step == 1
        monkeypatch.setattr(ucx_worker, "libucxx", WithoutAddresses)
    with pytest.raises(PeerLost):
        target.receiver.recv(5)
    monkeypatch.undo()


def test_message_under_another_tag_reaches_nobody(target: Target) -> None:
    with insider(target) as peer:
        stray = peer.worker.connect(target.receiver._mailbox.address, TAG_NUMBER + 1)  # type: ignore[attr-defined]
        for number in range(10):
            peer.worker.send(stray, FRAME, header(number + 1), NOTHING)
        assert target.receiver.recv(0.1) is None
        peer.say(FRAME, header(1))
        assert receive(target.receiver).header.step == 1


def test_peer_that_sends_without_end_takes_no_more_memory_than_a_window(target: Target) -> None:
    with insider(target) as peer:
        for number in range(1, 301):
            peer.say(FRAME, header(number), 50_000)
        time.sleep(0.1)  # the stage computes, and takes nothing
        waiting = target.receiver._mailbox._arrived  # type: ignore[attr-defined]
        assert 0 < len(waiting) <= OPTIONS.queue_bytes // 50_000 + 1
        for number in range(1, 301):
            assert receive(target.receiver).header.step == number


def test_peer_that_leaves_in_the_middle_of_a_large_frame_is_lost(target: Target) -> None:
    target.receiver._mailbox._max_bytes = 1 << 40  # type: ignore[attr-defined]
    with insider(target) as peer:
        peer.say_raw(PREFIX.pack(FRAME, 0, 8_000_000) + bytes(48))
        peer.say_raw(bytes(8_000_000), as_rest=True)  # it is asked for the rest, and never sends it
        assert target.receiver.recv(0.05) is None
    with pytest.raises(PeerLost):
        while True:
            target.receiver.recv(5)


def test_peer_that_says_that_it_ends_is_lost(target: Target) -> None:
    with insider(target) as peer:
        peer.say(END, b"")
        with pytest.raises(PeerLost):
            target.receiver.recv(5)
        peer.say(FRAME, header(1))
        assert target.receiver.recv(0.1) is None


@pytest.mark.parametrize("answer", [b"\xff\xff", b"", b"long"])
def test_receiver_that_answers_nonsense_only_keeps_its_sender_waiting(answer: bytes) -> None:
    """Grants that are none, or that claim what was never sent."""
    options = TransportOptions(silence_s=0.6, linger_s=0.2, queue_frames=8)
    with linked("ucx", options) as (_, link, receiver):
        assert receiver.recv(SHORT) is None
        (inlet,) = receiver._mailbox._inlets.values()  # type: ignore[attr-defined]
        worker = receiver._mailbox.worker  # type: ignore[attr-defined]
        assert fill(link) == 8
        said = answer if answer != b"long" else bytes(10_000_000)
        for kind in (GRANT, FRAME, 99):
            worker.send(inlet.back, kind, said, NOTHING)
        lie = frame_pb2.LinkGrant(taken_frames=1 << 40, window_frames=1 << 30, window_bytes=1 << 40)
        worker.send(inlet.back, GRANT, lie.SerializeToString(), NOTHING)
        with pytest.raises(QueueFull):
            link.send(numbered(9), timeout=0.2)
        for number in range(8):
            assert receive(receiver).header.step == number
        link.send(numbered(10), timeout=1)
        assert receive(receiver).header.step == 10


def test_whoever_listens_with_another_key_is_not_spoken_to() -> None:
    with make_transport("ucx", 0) as sender, make_transport("ucx", 1) as receiver:
        receiver.allow([sender.public_key])
        peer = Peer(receiver.listen(), Identity().public_key.hex(), 1)
        with pytest.raises(ConnectFailed, match="does not hold the expected key"):
            sender.connect(peer, timeout=0.2)
