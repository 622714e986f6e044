"""Hostile peers at a door. Each test ends with a good peer that still gets its frame through."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from eldric.transport.base import Peer, Transport
from eldric.transport.codec import encode_header, stamp
from eldric.transport.errors import ConnectFailed, PeerLost
from eldric.transport.filter import DropReason
from eldric.transport.identity import Identity
from eldric.transport.mailbox import FRAME, HELLO
from eldric.transport.opening import Conversation, open_outbound
from eldric.transport.shm_mailbox import PACKET
from eldric.transport.shm_memory import SenderMemory
from eldric.v1 import frame_pb2
from tests.transports import PIPELINE, QUICK, linked, make_transport, numbered, peer_of, receive

OPTIONS = replace(QUICK, max_payload_bytes=100_000, queue_bytes=1_000_000)
GOOD_HELLO = frame_pb2.LinkHello(protocol_version=1, pipeline_id=PIPELINE, from_stage=0, epoch=1)
HEADER = encode_header(numbered(1), stamp(PIPELINE, 1, 0), 1, 0)


class Target:
    """A stage that is attacked, and who may speak to it."""

    def __init__(self, receiver: Transport, good_key: str) -> None:
        self.receiver, self.good_key, self.address = receiver, good_key, receiver.listen()

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect("\0eldric-shm-" + self.address.rpartition(":")[2])
        return sock

    def talk(self) -> Conversation:
        return Conversation(self.dial(), time.monotonic() + 5)

    def dropped(self, reason: DropReason, at_least: int) -> None:
        """Wait until that many were dropped for that reason; nothing may come in meanwhile."""
        deadline = time.monotonic() + 5
        while self.receiver.stats.dropped[reason] < at_least:
            assert time.monotonic() < deadline, self.receiver.stats
            assert self.receiver.recv(0.02) is None

    def refused(self, times: int) -> None:
        """Wait until that many connections were refused: whoever was hears of it before it is counted."""
        deadline = time.monotonic() + 5
        while self.receiver.stats.refused < times:
            assert time.monotonic() < deadline, self.receiver.stats
            assert self.receiver.recv(0.02) is None
        assert self.receiver.stats.refused == times


@pytest.fixture
def target() -> Iterator[Target]:
    with linked("shm", OPTIONS) as (sender, link, receiver):
        yield Target(receiver, sender.public_key)
        link.send(numbered(42))
        while True:
            with suppress(PeerLost):  # an insider that has left
                if receive(receiver).header.step == 42:
                    return


@contextmanager
def insider(target: Target, hello: frame_pb2.LinkHello = GOOD_HELLO) -> Iterator[tuple[SenderMemory, socket.socket]]:
    """A peer whose key is allowed, and who does not keep to the protocol: its memory and its socket."""
    identity = Identity()
    target.receiver.allow([target.good_key, identity.public_key.hex()])
    memory = SenderMemory(OPTIONS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    talk = target.talk()
    with talk.socket, ours, theirs:
        passed = (memory.descriptor, theirs.fileno())
        open_outbound(talk, hello, identity, target.receiver.public_key, b"", passed)
        yield memory, ours
    memory.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 4,
        b"\xff" * 8,
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        struct.pack("<I", 2) + frame_pb2.LinkOpen(hello=GOOD_HELLO, nonce=b"short").SerializeToString()[:2],
        struct.pack("<I", 16 * 1024 + 1) + bytes(20_000),
    ],
)
def test_garbage_at_the_door_does_nothing(target: Target, garbage: bytes) -> None:
    for lingers in (False, True):
        with target.dial() as sock, suppress(ConnectionError):
            sock.sendall(garbage)
            if lingers:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
    assert target.receiver.recv(0.05) is None


def test_peer_that_says_nothing_is_let_go_after_a_while(target: Target) -> None:
    with target.dial() as sock:
        began = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - began < QUICK.silence_s + 1


def test_many_that_say_nothing_do_not_keep_others_out_for_long(target: Target) -> None:
    with make_transport("shm", 0, OPTIONS) as late:
        target.receiver.allow([target.good_key, late.public_key])
        crowd = [target.dial() for _ in range(40)]
        late.connect(peer_of(target.receiver, target.address), timeout=5)
        for sock in crowd:
            sock.close()
        late.close()
        with pytest.raises(PeerLost):
            target.receiver.recv(5)


def test_key_is_of_no_use_without_its_private_half(target: Target) -> None:
    class Thief(Identity):
        def __init__(self, public_key: str) -> None:
            super().__init__()
            self.public_key = bytes.fromhex(public_key)

    talk = target.talk()
    with talk.socket, pytest.raises(ConnectFailed, match="does not allow"):
        open_outbound(talk, GOOD_HELLO, Thief(target.good_key), target.receiver.public_key, b"", ())
    target.refused(1)


def test_proof_cannot_be_used_again(target: Target) -> None:
    """What one opening said is of no use in the next, where the receiver's random number is another."""
    identity = Identity()
    target.receiver.allow([target.good_key, identity.public_key.hex()])
    talk = target.talk()
    said: list[frame_pb2.LinkProof | frame_pb2.LinkOpen] = []
    say = talk.say
    talk.say = lambda message, descriptors=(): (said.append(message), say(message, descriptors))[1]  # type: ignore
    with talk.socket:
        open_outbound(talk, GOOD_HELLO, identity, target.receiver.public_key, b"", ())
    again = target.talk()
    with again.socket:
        again.say(said[0])
        again.hear(frame_pb2.LinkAccept)
        again.say(said[1])
        assert "does not allow" in again.hear(frame_pb2.LinkGrant).refused


@pytest.mark.parametrize("fields", [{"protocol_version": 2}, {"pipeline_id": "x"}, {"from_stage": 9999}])
def test_hello_that_does_not_fit_is_refused(target: Target, fields: dict[str, object]) -> None:
    identity = Identity()
    target.receiver.allow([target.good_key, identity.public_key.hex()])
    hello = frame_pb2.LinkHello()
    hello.MergeFrom(GOOD_HELLO)
    for name, value in fields.items():
        setattr(hello, name, value)
    talk = target.talk()
    with talk.socket:
        _, grant = open_outbound(talk, hello, identity, target.receiver.public_key, b"", ())
    assert grant.refused


@pytest.mark.parametrize("case", ["none", "no memory", "unsealed", "no socket", "stream"])
def test_link_without_its_memory_and_socket_is_refused(target: Target, case: str) -> None:
    identity = Identity()
    target.receiver.allow([target.good_key, identity.public_key.hex()])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM if case == "stream" else socket.SOCK_SEQPACKET)
    memory = SenderMemory(OPTIONS)
    plain = os.memfd_create("plain")
    passed = {
        "none": (),
        "no memory": (theirs.fileno(), theirs.fileno()),
        "unsealed": (plain, theirs.fileno()),
        "no socket": (memory.descriptor, plain),
        "stream": (memory.descriptor, theirs.fileno()),
    }[case]
    talk = target.talk()
    with talk.socket, ours, theirs:
        open_outbound(talk, GOOD_HELLO, identity, target.receiver.public_key, b"", passed)
        assert target.receiver.recv(0.1) is None
        talk.socket.settimeout(5)
        while talk.socket.recv(1):  # signs of life, then the end
            pass
    os.close(plain)
    memory.close()


def test_malformed_packets_are_dropped_and_counted(target: Target) -> None:
    with insider(target) as (_, sock):
        packets = [
            b"\0",
            bytes((FRAME,)),
            PACKET.pack(FRAME, 2**63, 10) + HEADER,
            PACKET.pack(FRAME, 0, 2**63) + HEADER,
            bytes((HELLO,)) + b"\xff\xff",
            bytes((HELLO,)) + frame_pb2.LinkHello(protocol_version=1, pipeline_id="x").SerializeToString(),
            PACKET.pack(FRAME, 0, 0) + b"\xff\xff",
            PACKET.pack(FRAME, 0, 0) + bytes(20_000),
        ]
        for packet in packets:
            sock.send(packet)
        target.dropped(DropReason.CORRUPT, len(packets))
        for _ in range(3):
            sock.send(PACKET.pack(FRAME, 0, 0) + HEADER)
        assert receive(target.receiver).header.step == 1
        target.dropped(DropReason.REPLAYED, 2)
        sock.send(PACKET.pack(FRAME, 0, 100_001) + HEADER)
        target.dropped(DropReason.OVERSIZED, 1)


def test_peer_that_sends_without_end_is_slowed_down(target: Target) -> None:
    with insider(target) as (_, sock):
        sock.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 5000:
                sock.send(PACKET.pack(FRAME, 0, 0) + HEADER)
                sent += 1
        assert sent > 0


def test_another_user_is_not_spoken_to(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_transport("shm", 0, OPTIONS) as sender:
        target.receiver.allow([target.good_key, sender.public_key])
        monkeypatch.setattr("eldric.transport.opening.os.geteuid", lambda: 12345)
        with pytest.raises(ConnectFailed, match="belongs to user"):
            sender.connect(Peer(target.address, target.receiver.public_key, 1), timeout=0.2)
        monkeypatch.undo()
