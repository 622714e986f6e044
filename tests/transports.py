"""Transports for tests: made in pairs, closed at the end, with frames that say their number."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

from eldric.transport import registry
from eldric.transport.base import Link, Peer, Transport, TransportOptions
from eldric.transport.errors import QueueFull
from eldric.transport.frame import Frame, FrameKind, Header

PIPELINE = "pipeline-1"
QUICK = TransportOptions(silence_s=0.6, relay_silence_s=0.6, linger_s=0.5)
SHORT = 0.05  # seconds in which nothing is expected to happen

#: Set where the suite is run for UCX alone. Its package and the one of libllama, our reference, cannot be loaded into
#: one process (both bring types of the Cython runtime, of different sizes); see test_transport_ucx.py.
UCX_ALONE = "ELDRIC_TEST_UCX"

#: Every transport that links processes; each of them passes the whole suite of test_transport_*.py.
BETWEEN_PROCESSES = ["ucx"] if os.environ.get(UCX_ALONE) else ["zmq", "shm", "relay"]
WITH_A_DOOR = [scheme for scheme in BETWEEN_PROCESSES if scheme in ("shm", "ucx")]
EVERY_TRANSPORT = BETWEEN_PROCESSES if os.environ.get(UCX_ALONE) else [*BETWEEN_PROCESSES, "inproc"]


def make_transport(scheme: str, stage: int, options: TransportOptions = QUICK, pipeline: str = PIPELINE) -> Transport:
    """A transport in epoch 1."""
    transport = registry.create(scheme, pipeline, stage, options)
    transport.set_epoch(1)
    return transport


def peer_of(transport: Transport, address: str) -> Peer:
    return Peer(address, transport.public_key, transport.stage)


@contextmanager
def linked(scheme: str, options: TransportOptions = QUICK) -> Iterator[tuple[Transport, Link, Transport]]:
    """Stage 0, its link to stage 1, and stage 1."""
    with ExitStack() as stack:
        sender = stack.enter_context(make_transport(scheme, 0, options))
        receiver = stack.enter_context(make_transport(scheme, 1, options))
        receiver.allow([sender.public_key])
        yield sender, sender.connect(peer_of(receiver, receiver.listen())), receiver


def numbered(number: int) -> Header:
    """A header that carries a number."""
    return Header(kind=FrameKind.PROBE, step=number)


def receive(transport: Transport, timeout: float = 5.0) -> Frame:
    """The next frame, which must come."""
    frame = transport.recv(timeout)
    assert frame is not None, f"no frame in {timeout} s; {transport.stats}"
    return frame


def fill(link: Link) -> int:
    """Send until the queue is full; gives how many frames went."""
    for number in count():
        try:
            link.send(numbered(number), b"", timeout=0.2)
        except QueueFull:
            return number
    raise AssertionError
