"""ZeroMQ alone: what hostile peers can do at the port: nothing."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import zmq
import zmq.utils.monitor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eldric.transport.base import Transport
from eldric.transport.codec import encode_header, stamp
from eldric.transport.errors import PeerLost
from eldric.transport.filter import DropReason
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.v1 import frame_pb2
from tests.transports import PIPELINE, QUICK, linked, make_transport, numbered, peer_of, receive


def test_plain_transport_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    make_transport("zmq", 0, replace(QUICK, encrypt=False)).close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without encryption" in caplog.text


def test_ipv6_and_names_are_addresses_too() -> None:
    for host in ("localhost", "::1"):
        with make_transport("zmq", 0) as sender, make_transport("zmq", 1) as receiver:
            receiver.allow([sender.public_key])
            link = sender.connect(peer_of(receiver, receiver.listen(host)))
            link.send(numbered(1))
            receive(receiver)


# Hostile peers. Each test ends with a good peer that still gets its frame through.


class Place(NamedTuple):
    host: str
    port: int
    good_key: str  # of the peer that keeps to the protocol


@contextmanager
def under_attack(encrypt: bool = True) -> Iterator[tuple[Transport, Place]]:
    """A stage with a good peer, and where it listens. The good peer's frame gets through afterwards."""
    with linked("zmq", replace(QUICK, encrypt=encrypt, max_payload_bytes=100_000)) as (sender, link, receiver):
        host, _, port = receiver.listen().removeprefix("zmq://").rpartition(":")
        yield receiver, Place(host, int(port), sender.public_key)
        link.send(numbered(42))
        while True:
            try:
                if receive(receiver).header.step == 42:
                    return
            except PeerLost:  # an insider that has left
                pass


GARBAGE = [
    b"",
    b"\0" * 64,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff" * 100_000,
    b"\xff\0\0\0\0\0\0\0\0\x7f\x03\1CURVE" + b"\0" * 47,  # a greeting, then silence
    b"\xff\0\0\0\0\0\0\0\0\x7f\x03\1CURVE" + b"\0" * 47 + b"\x06" + b"\xff" * 8 + b"x" * 1000,  # 2^64 bytes announced
    b"\xff\0\0\0\0\0\0\0\0\x7f\x03\1NULL" + b"\0" * 48 + b"\4\x05\5READY",
    b"\xff\0\0\0\0\0\0\0\1\x7f\1\5\0\0\0\0",  # an old protocol
]


@pytest.mark.parametrize("encrypt", [True, False])
def test_garbage_on_the_port_does_nothing(encrypt: bool) -> None:
    with under_attack(encrypt) as (receiver, place):
        for garbage in GARBAGE:
            for linger in (False, True):
                with socket.create_connection(place[:2], timeout=5) as raw:
                    raw.settimeout(0.05)
                    try:
                        raw.sendall(garbage)
                        if linger:
                            while raw.recv(4096):
                                pass
                    except (TimeoutError, ConnectionError, BrokenPipeError):
                        pass
        assert receiver.recv(0.1) is None  # and no PeerLost
        assert receiver.stats.frames == 0


def test_connections_that_came_and_went_are_not_mixed_up_with_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """File descriptors are used again at once; ends of strangers are in the queue when the good peer says hello."""

    def late(message: list[bytes]) -> zmq.utils.monitor._MonitorMessage:
        time.sleep(0.005)  # a guard that lags behind
        return zmq.utils.monitor.parse_monitor_message(message)

    monkeypatch.setattr("eldric.transport.zmq_guard.parse_monitor_message", late)
    with make_transport("zmq", 0) as sender, make_transport("zmq", 1) as receiver:
        peer = peer_of(receiver, receiver.listen())
        host, _, port = peer.address.removeprefix("zmq://").rpartition(":")
        for _ in range(30):
            socket.create_connection((host, int(port))).close()
        receiver.allow([sender.public_key])
        sender.connect(peer).send(numbered(1))
        assert receive(receiver).header.step == 1
        assert receiver.recv(0.2) is None
        sender.close()
        with pytest.raises(PeerLost):
            receiver.recv(5)


@contextmanager
def raw_peer(place: Place, kind: int, options: dict[str, bytes]) -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(kind) as peer:
        peer.linger = 0
        for name, value in options.items():
            setattr(peer, name, value)
        peer.connect(f"tcp://{place.host}:{place.port}")
        yield peer


def curve(receiver_key: str, public: bytes, secret: bytes) -> dict[str, bytes]:
    return {"curve_publickey": public, "curve_secretkey": secret, "curve_serverkey": receiver_key.encode()}


HELLO = frame_pb2.LinkHello(
    protocol_version=PROTOCOL_VERSION, pipeline_id=PIPELINE, from_stage=0, epoch=1
).SerializeToString()
OTHER_HELLO = frame_pb2.LinkHello(
    protocol_version=PROTOCOL_VERSION, pipeline_id=PIPELINE, from_stage=9
).SerializeToString()
FRAME = encode_header(numbered(1), stamp(PIPELINE, 1, 0), 1, 0)


def test_peers_without_the_key_get_nowhere() -> None:
    with under_attack() as (receiver, place):
        public, secret = zmq.curve_keypair()
        wrong_server = zmq.curve_keypair()[0].decode()
        plain = {"plain_username": b"operator", "plain_password": b"secret"}
        for options in ({}, plain, curve(wrong_server, public, secret), curve(receiver.public_key, public, secret)):
            for kind in (zmq.DEALER, zmq.PUSH, zmq.REQ):
                with raw_peer(place, kind, options) as peer:
                    for _ in range(3):
                        try:
                            peer.send_multipart([HELLO], zmq.NOBLOCK)
                            peer.send_multipart([FRAME, b""], zmq.NOBLOCK)
                        except zmq.ZMQError:
                            break
                    assert receiver.recv(0.05) is None
        assert receiver.stats.frames == 0 and receiver.stats.peers == 1
        assert receiver.stats.refused > 0


@contextmanager
def insider(receiver: Transport, place: Place, hello: bool = True) -> Iterator["zmq.Socket[bytes]"]:
    """A peer whose key is allowed, and who does not keep to the protocol."""
    public, secret = zmq.curve_keypair()
    receiver.allow([place.good_key, public.decode()])
    with raw_peer(place, zmq.DEALER, curve(receiver.public_key, public, secret)) as peer:
        if hello:
            peer.send(HELLO)
        yield peer


def dropped(receiver: Transport, reason: DropReason, at_least: int) -> None:
    """Wait until that many were dropped for that reason; nothing may come in meanwhile."""
    deadline = time.monotonic() + 5
    while receiver.stats.dropped[reason] < at_least:
        assert time.monotonic() < deadline, receiver.stats
        assert receiver.recv(0.02) is None


def test_wrong_part_counts_are_dropped_and_counted() -> None:
    with under_attack() as (receiver, place), insider(receiver, place) as peer:
        messages = [[b""], [FRAME], [OTHER_HELLO], [FRAME, b"", b""], [FRAME, *[b"x"] * 5000], [b"", b"", b""]]
        for message in messages:
            peer.send_multipart(message)
        dropped(receiver, DropReason.CORRUPT, len(messages))
        peer.send_multipart([FRAME, b""])
        assert receive(receiver).header.step == 1


def test_frames_before_a_hello_are_dropped_and_counted() -> None:
    with under_attack() as (receiver, place), insider(receiver, place, hello=False) as peer:
        peer.send_multipart([FRAME, b""])
        peer.send_multipart([b"\xff\xff\xff"])
        dropped(receiver, DropReason.UNKNOWN_PEER, 1)
        dropped(receiver, DropReason.CORRUPT, 1)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, f"protocol version {PROTOCOL_VERSION + 1}"),
        ({"pipeline_id": "x"}, "pipeline 'x'"),
        ({"from_stage": 9999}, "stage 9999"),
    ],
)
def test_hello_that_does_not_fit_is_refused_with_a_reason(fields: dict[str, object], problem: str) -> None:
    with under_attack() as (receiver, place), insider(receiver, place, hello=False) as peer:
        hello = {"protocol_version": PROTOCOL_VERSION, "pipeline_id": PIPELINE, "from_stage": 0} | fields
        peer.send(frame_pb2.LinkHello(**hello).SerializeToString())  # type: ignore[arg-type]
        assert receiver.recv(0.2) is None
        assert problem in frame_pb2.LinkGrant.FromString(peer.recv()).refused
        assert receiver.stats.refused == 1


def test_replayed_and_oversized_frames_are_dropped_and_counted() -> None:
    with under_attack() as (receiver, place), insider(receiver, place) as peer:
        for _ in range(3):
            peer.send_multipart([FRAME, b""])
        assert receive(receiver).header.step == 1
        dropped(receiver, DropReason.REPLAYED, 2)
        peer.send_multipart([FRAME, bytes(100_001)])
        dropped(receiver, DropReason.OVERSIZED, 1)


def test_giant_message_ends_its_connection_alone() -> None:
    with under_attack() as (receiver, place), insider(receiver, place) as peer:
        peer.send_multipart([FRAME, b""])
        receive(receiver)
        peer.send_multipart([FRAME, bytes(10_000_000)])
        with pytest.raises(PeerLost) as lost:
            receiver.recv(5)
        assert lost.value.inbound


def test_flood_of_an_insider_is_bounded() -> None:
    """A peer that ignores grants is slowed down by ZeroMQ's own bound."""
    with under_attack() as (receiver, place), insider(receiver, place) as peer:
        peer.sndhwm = 1
        sent = 0
        peer.sndtimeo = 300
        with pytest.raises(zmq.Again):
            for _ in range(1000):
                peer.send_multipart([FRAME, bytes(100_000)])
                sent += 1
        assert sent < 500


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=4), min_size=1, max_size=5))
def test_fuzzed_messages_are_dropped_and_counted(
    messages: list[list[bytes]], attacked: tuple[Transport, "zmq.Socket[bytes]"]
) -> None:
    receiver, peer = attacked
    before = sum(receiver.stats.dropped.values())
    for message in messages:
        peer.send_multipart(message)
    deadline = time.monotonic() + 5
    while sum(receiver.stats.dropped.values()) < before + len(messages):
        assert receiver.recv(0.001) is None and time.monotonic() < deadline


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[Transport, "zmq.Socket[bytes]"]]:
    with under_attack() as (receiver, place), insider(receiver, place) as peer:
        yield receiver, peer
