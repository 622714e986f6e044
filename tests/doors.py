"""Stages that are attacked at their door, by transports that have one: shm and ucx."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from eldric.transport.addresses import split_address
from eldric.transport.base import Transport
from eldric.transport.codec import encode_header, stamp
from eldric.transport.errors import PeerLost
from eldric.transport.filter import DropReason
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.transport.identity import Identity
from eldric.transport.opening import Conversation
from eldric.v1 import frame_pb2
from tests.transports import PIPELINE, QUICK, linked, numbered, receive

OPTIONS = replace(QUICK, max_payload_bytes=100_000, queue_bytes=1_000_000)
GOOD_HELLO = frame_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, pipeline_id=PIPELINE, from_stage=0, epoch=1)


def header(serial: int = 1, *, pipeline: str = PIPELINE, epoch: int = 1, stage: int = 0) -> bytes:
    """Of a frame whose step is its serial."""
    return encode_header(numbered(serial), stamp(pipeline, epoch, stage), serial, 0)


class Target:
    """A stage that is attacked, and who may speak to it."""

    def __init__(self, receiver: Transport, good_key: str) -> None:
        self.receiver, self.good_key, self.address = receiver, good_key, receiver.listen()

    def dial(self) -> socket.socket:
        if self.receiver.scheme != "shm":
            return socket.create_connection(split_address(self.address, self.receiver.scheme), 5)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect("\0eldric-shm-" + self.address.rpartition(":")[2])
        return sock

    def talk(self) -> Conversation:
        return Conversation(self.dial(), time.monotonic() + 5)

    def insider(self) -> Identity:
        """Of a peer who is let in from now on, beside the good one."""
        identity = Identity()
        self.receiver.allow([self.good_key, identity.public_key.hex()])
        return identity

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


@contextmanager
def attacked(scheme: str) -> Iterator[Target]:
    """At the end, a good peer still gets its frame through."""
    with linked(scheme, OPTIONS) as (sender, link, receiver):
        yield Target(receiver, sender.public_key)
        link.send(numbered(42))
        while True:
            with suppress(PeerLost):  # an insider that has left
                if receive(receiver).header.step == 42:
                    return
