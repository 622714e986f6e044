"""Insiders of shm who do not keep to its protocol. Each test ends with a good peer whose frame gets through."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eldric.transport.base import Peer
from eldric.transport.errors import ConnectFailed
from eldric.transport.filter import DropReason
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.transport.mailbox import FRAME, HELLO
from eldric.transport.opening import open_outbound
from eldric.transport.shm_mailbox import PACKET
from eldric.transport.shm_memory import SenderMemory
from eldric.v1 import frame_pb2
from tests.doors import GOOD_HELLO, OPTIONS, Target, attacked, header
from tests.transports import make_transport, receive

HEADER = header()


@pytest.fixture
def target() -> Iterator[Target]:
    with attacked("shm") as made:
        yield made


@contextmanager
def insider(target: Target, hello: frame_pb2.LinkHello = GOOD_HELLO) -> Iterator[tuple[SenderMemory, socket.socket]]:
    """A peer whose key is allowed, and who does not keep to the protocol: its memory and its socket."""
    identity = target.insider()
    memory = SenderMemory(OPTIONS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    talk = target.talk()
    with talk.socket, ours, theirs:
        passed = (memory.descriptor, theirs.fileno())
        open_outbound(talk, hello, identity, target.receiver.public_key, b"", passed)
        yield memory, ours
    memory.close()


@pytest.mark.parametrize("case", ["none", "no memory", "unsealed", "no socket", "stream"])
def test_link_without_its_memory_and_socket_is_refused(target: Target, case: str) -> None:
    identity = target.insider()
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
            bytes((HELLO,))
            + frame_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, pipeline_id="x").SerializeToString(),
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
