"""How a link with a connection of its own opens: the messages of frame.proto's LinkOpen, and their checks.

Blocking, with a deadline for the whole of it; every message is bounded. Over unix sockets file descriptors go along,
and only processes of the same user are spoken to.
"""

import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from eldric.transport.errors import ConnectFailed
from eldric.transport.filter import Sender
from eldric.transport.identity import NONCE_BYTES, RECEIVER, SENDER, Identity, bare, is_proven, nonce
from eldric.v1 import frame_pb2

MAX_MESSAGE_BYTES = 16 * 1024
MAX_DESCRIPTORS = 2  # with one message
NOT_ALLOWED = "it does not allow this transport's key"
_LENGTH = struct.Struct("<I")
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group

AnyMessage = TypeVar("AnyMessage", bound=Message)


@dataclass(slots=True, eq=False, kw_only=True)
class Wire(Sender):
    """A connection that has opened. Its socket is the door's from then on."""

    socket: socket.socket
    inbound: bool  # the peer sends frames, else this end does
    key: str  # of the peer, hexadecimal; empty when there are none
    address: bytes  # where the peer is to be reached by other means
    descriptors: list[int] = field(default_factory=list)  # that came from the sender
    closed: str | None = None  # why it is of no use any more
    heard: float = 0.0  # when the peer last gave a sign, by time.monotonic

    def hang_up(self, reason: str) -> None:
        """Let go of it, from any thread. The door closes the socket, and reports nothing."""
        self.closed = self.closed or reason
        with suppress(OSError):  # the peer was quicker
            self.socket.shutdown(socket.SHUT_RDWR)


class Conversation:
    """Length-prefixed messages over a connected stream socket, until a deadline (of time.monotonic)."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.socket, self._deadline = sock, deadline
        self.descriptors: list[int] = []  # that have come
        self._is_local = sock.family == socket.AF_UNIX

    def check_peer(self) -> None:
        """Raises ConnectFailed when the other end is another user's."""
        if self._is_local:
            credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            user = _PEER_CREDENTIALS.unpack(credentials)[1]
            if user != os.geteuid():
                raise ConnectFailed(f"it belongs to user {user}, this process to user {os.geteuid()}")

    def say(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self._set_timeout()
        data = message.SerializeToString(deterministic=True)
        if descriptors:
            socket.send_fds(self.socket, [_LENGTH.pack(len(data))], descriptors)
            self.socket.sendall(data)
        else:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)

    def hear(self, kind: type[AnyMessage]) -> AnyMessage:
        """Raises ConnectFailed for what is no such message, OSError (TimeoutError among them)."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise ConnectFailed(f"a message of {length} bytes, at most {MAX_MESSAGE_BYTES}")
        try:
            return kind.FromString(self._read(length))
        except DecodeError as error:
            raise ConnectFailed(f"it does not speak this protocol: no {kind.DESCRIPTOR.name}") from error

    def drop_descriptors(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._set_timeout()
            part = self._receive(count - len(data))
            if not part:
                raise ConnectFailed("it closed the connection while the link was opened")
            data += part
        return data

    def _receive(self, count: int) -> bytes:
        if not self._is_local:
            return self.socket.recv(count)
        data, descriptors, _, _ = socket.recv_fds(self.socket, count, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        self.descriptors += descriptors
        if len(self.descriptors) > MAX_DESCRIPTORS:
            raise ConnectFailed(f"more than {MAX_DESCRIPTORS} file descriptors")
        return data

    def _set_timeout(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        self.socket.settimeout(left_s)


def open_outbound(
    talk: Conversation,
    hello: frame_pb2.LinkHello,
    identity: Identity | None,
    expected_key: str,
    address: bytes,
    descriptors: Sequence[int],
) -> tuple[frame_pb2.LinkAccept, frame_pb2.LinkGrant]:
    """The sender's part. Raises ConnectFailed, also when the receiver does not let this key in; OSError."""
    talk.check_peer()
    key = b"" if identity is None else identity.public_key
    opening = frame_pb2.LinkOpen(hello=hello, public_key=key, nonce=nonce(), address=address)
    talk.say(opening)
    accepted = talk.hear(frame_pb2.LinkAccept)
    said = opening.SerializeToString(deterministic=True), bare(accepted)
    if accepted.public_key.hex() != expected_key or (
        expected_key and not is_proven(accepted.public_key, accepted.proof, RECEIVER, *said)
    ):
        raise ConnectFailed("it does not hold the expected key")
    proof = b"" if identity is None else identity.prove(SENDER, *said)
    talk.say(frame_pb2.LinkProof(proof=proof), descriptors)
    grant = talk.hear(frame_pb2.LinkGrant)
    if grant.refused == NOT_ALLOWED:
        raise ConnectFailed(NOT_ALLOWED)
    return accepted, grant


def open_inbound(talk: Conversation, identity: Identity | None, address: bytes) -> frame_pb2.LinkOpen | None:
    """The receiver's part, up to its grant. None: the peer has not proven its key. Raises ConnectFailed, OSError."""
    talk.check_peer()
    opening = talk.hear(frame_pb2.LinkOpen)
    if len(opening.nonce) != NONCE_BYTES:
        raise ConnectFailed(f"a nonce of {len(opening.nonce)} bytes")
    accepted = frame_pb2.LinkAccept(nonce=nonce(), address=address)
    if identity is not None:
        accepted.public_key = identity.public_key
    said = opening.SerializeToString(deterministic=True), bare(accepted)
    if identity is not None:
        accepted.proof = identity.prove(RECEIVER, *said)
    talk.say(accepted)
    proof = talk.hear(frame_pb2.LinkProof).proof
    proven = identity is None or is_proven(opening.public_key, proof, SENDER, *said)
    return opening if proven else None
