"""Hostile peers at a door. Each test ends with a good peer that still gets its frame through."""

import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from eldric.transport.errors import ConnectFailed, PeerLost
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.transport.identity import Identity
from eldric.transport.opening import open_outbound
from eldric.v1 import frame_pb2
from tests.doors import GOOD_HELLO, OPTIONS, Target, attacked
from tests.transports import QUICK, WITH_A_DOOR, make_transport, peer_of


@pytest.fixture(params=WITH_A_DOOR)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with attacked(request.param) as made:
        yield made


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
        with target.dial() as sock, suppress(OSError):
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
    with make_transport(target.receiver.scheme, 0, OPTIONS) as late:
        target.receiver.allow([target.good_key, late.public_key])
        crowd = [target.dial() for _ in range(40)]
        late.connect(peer_of(target.receiver, target.address), timeout=5)
        for sock in crowd:
            sock.close()
        late.close()
        with pytest.raises(PeerLost):
            target.receiver.recv(5)


@pytest.mark.parametrize("lacking", ["files", "threads"])
def test_door_without_files_or_threads_waits_and_goes_on(
    target: Target, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that waits makes a listener readable: taking it must not be tried again and again."""

    def fail(*_: object) -> None:
        tries.append(lacking)
        raise OSError(errno.EMFILE, "Too many open files") if lacking == "files" else RuntimeError("no new thread")

    tries: list[str] = []
    with monkeypatch.context() as patch:
        owner, name = (socket.socket, "accept") if lacking == "files" else (threading.Thread, "start")
        patch.setattr(owner, name, fail)
        with target.dial() as waiting:
            time.sleep(0.3)
            assert len(tries) == 1
            patch.undo()
            assert waiting.recv(1) == b"", "it is let go, at once or when it said nothing"


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
    identity = target.insider()
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


@pytest.mark.parametrize(
    "fields", [{"protocol_version": PROTOCOL_VERSION + 1}, {"pipeline_id": "x"}, {"from_stage": 9999}]
)
def test_hello_that_does_not_fit_is_refused(target: Target, fields: dict[str, object]) -> None:
    identity = target.insider()
    hello = frame_pb2.LinkHello()
    hello.MergeFrom(GOOD_HELLO)
    for name, value in fields.items():
        setattr(hello, name, value)
    talk = target.talk()
    with talk.socket:
        _, grant = open_outbound(talk, hello, identity, target.receiver.public_key, b"", ())
    assert grant.refused
