"""Frames between stages of one host: payloads through shared memory, all else through unix sockets. Linux only.

A peer is a process of the same user that holds the expected key. Nothing is left behind by ends that are killed: the
memory has no name, the sockets have abstract ones. What was sent lies in memory that the receiver holds, so closing
waits for nothing and loses nothing. The host in an address is of no meaning.
"""

import os
import secrets
import select
import socket
from contextlib import suppress

from eldric.transport.addresses import join_address, split_address
from eldric.transport.base import Link, Peer, TransportOptions
from eldric.transport.errors import ListenFailed, UnknownTransport
from eldric.transport.mailbox import FRAME, HELLO
from eldric.transport.opening import Wire
from eldric.transport.shm_mailbox import PACKET, ShmMailbox
from eldric.transport.shm_memory import SenderMemory
from eldric.transport.threads import require_threads
from eldric.transport.windowed_link import Encode, WindowedLink
from eldric.transport.wired import WiredTransport
from eldric.v1 import frame_pb2

_MAX_GRANT_BYTES = 4096
_TRIES = 100  # to find a free number
_FIRST_NUMBER, _LAST_NUMBER = 1024, 65535
#: Memory in use from which a sender looks for grants before each frame.
_LOOK_BYTES = 4 * 1024 * 1024


class ShmTransport(WiredTransport):
    """See the module."""

    scheme = "shm"

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        """Raises UnknownTransport where the system cannot do it."""
        if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
            raise UnknownTransport("the transport 'shm' needs Linux")
        require_threads(1)
        super().__init__(pipeline_id, stage, options, ShmMailbox())

    @property
    def encryption(self) -> str:
        return "host"

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        self._check_open()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            number = _bind(listener, port)
            self._door.listen(listener)
        except OSError as error:
            listener.close()
            raise ListenFailed(f"cannot listen on {self.scheme} {port}: {error}") from error
        return join_address(self.scheme, host, number)

    def _make_link(self, peer: Peer, hello: frame_pb2.LinkHello, timeout: float) -> Link:
        name = _socket_name(split_address(peer.address, self.scheme).port)

        def dial(timeout_s: float) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(name)
            except BaseException:
                sock.close()
                raise
            return sock

        memory = SenderMemory(self.options)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                wire, grant = self._door.connect(
                    dial, peer, hello, timeout, descriptors=(memory.descriptor, theirs.fileno())
                )
        except BaseException:
            ours.close()
            memory.close()
            raise
        return ShmLink(peer, wire, hello, grant, ours, memory, self.encode)


class ShmLink(WindowedLink):
    """See ShmTransport."""

    def __init__(
        self,
        peer: Peer,
        wire: Wire,
        hello: frame_pb2.LinkHello,
        grant: frame_pb2.LinkGrant,
        sock: socket.socket,
        memory: SenderMemory,
        encode: Encode,
    ) -> None:
        super().__init__(peer, encode)
        self._wire, self._hello, self._socket, self._memory = wire, hello, sock, memory
        sock.setblocking(False)
        self._window.granted(grant)

    @property
    def epoch(self) -> int:
        return self._wire.epoch

    def confirm(self, epoch: int) -> None:
        self._wire.epoch = self._hello.epoch = epoch
        with suppress(OSError):  # the peer has just gone
            self._socket.send(bytes((HELLO,)) + self._hello.SerializeToString())

    @property
    def closed(self) -> str | None:
        return self._wire.closed

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._wire.hang_up("it was closed by this end")
            self._socket.close()
            self._memory.close()

    def _try_send(self, data: bytes, view: memoryview) -> bool:
        memory, window = self._memory, self._window
        if window.sent_bytes - window.taken_bytes >= _LOOK_BYTES:
            self._take_grants()
        start = memory.put(view)
        if start is None:
            return False
        size = view.nbytes
        try:
            self._socket.send(PACKET.pack(FRAME, start, size) + data)
        except OSError:  # the socket holds no more packets, or the peer has just gone
            memory.space.take_back()
            return False
        window.sent(size)
        return True

    def _wait_for_room(self, wait_s: float) -> None:
        events = select.POLLIN if not self._window.open else select.POLLIN | select.POLLOUT
        poller = select.poll()
        poller.register(self._socket, events)
        poller.poll(wait_s * 1000)

    def _take_grants(self) -> None:
        if self._socket.fileno() < 0:
            return
        with suppress(OSError):
            while data := self._socket.recv(_MAX_GRANT_BYTES):
                self._granted(data)
        self._memory.give_back(self._window.taken_frames)

    def _refused(self, reason: str) -> None:
        self._wire.hang_up(reason)


def _bind(listener: socket.socket, number: int) -> int:
    """Give it a free number, or this one. Raises OSError."""
    if number:
        listener.bind(_socket_name(number))
        return number
    for _ in range(_TRIES):
        number = _FIRST_NUMBER + secrets.randbelow(_LAST_NUMBER - _FIRST_NUMBER + 1)
        with suppress(OSError):  # it is in use
            listener.bind(_socket_name(number))
            return number
    raise OSError("no number is free")


def _socket_name(number: int) -> str:
    """In the abstract namespace (unix(7)): gone with its last user, and never a file."""
    return f"\0eldric-shm-{number}"
