"""The receiving end of shm: a unix socket of each inbound wire tells where its payloads lie.

On the socket, one packet for each frame: FRAME, where the payload begins in the wire's memory (8 bytes, little-endian),
its length (8 bytes), the header. Or HELLO and a LinkHello. The other way go LinkGrants. What was written to the memory
before a packet was sent can be read once it was received.
"""

import os
import select
import socket
import struct
from contextlib import suppress

from eldric.transport.bell import Bell
from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import MAX_HEADER_BYTES
from eldric.transport.mailbox import CORRUPT, END, FRAME, HELLO, NOTHING, Arrival, Mailbox
from eldric.transport.opening import Wire
from eldric.transport.shm_memory import ReceiverMemory

PACKET = struct.Struct("<BQQ")
_PACKET_BYTES = PACKET.size
MAX_PACKET_BYTES = PACKET.size + MAX_HEADER_BYTES


class _Inlet:
    """One inbound wire."""

    __slots__ = ("memory", "socket", "wire")

    def __init__(self, wire: Wire) -> None:
        """Takes the wire's descriptors over: its memory and its socket. Raises CorruptFrame."""
        descriptors = [wire.descriptors.pop(0) for _ in range(len(wire.descriptors))]
        if len(descriptors) != 2:
            for descriptor in descriptors:
                os.close(descriptor)
            raise CorruptFrame(f"{len(descriptors)} file descriptors came with the link, not 2")
        try:
            self.socket = socket.socket(fileno=descriptors[1])
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise CorruptFrame(f"the link's socket is none: {error}") from error
        try:
            self.memory = ReceiverMemory(descriptors[0])
        except CorruptFrame:
            self.socket.close()
            raise
        self.socket.setblocking(False)
        self.wire = wire

    def close(self) -> None:
        self.socket.close()
        self.memory.close()


class ShmMailbox(Mailbox):
    """See the module."""

    def __init__(self) -> None:
        self._bell = Bell()
        self._poller = select.poll()
        self._poller.register(self._bell, select.POLLIN)
        self._inlets: dict[int, _Inlet] = {}
        self._readable: list[tuple[int, int]] = []
        self._buffer = memoryview(bytearray(MAX_PACKET_BYTES + 1))

    def add(self, wire: Wire) -> None:
        inlet = _Inlet(wire)
        if (inlet.socket.family, inlet.socket.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            inlet.close()
            raise CorruptFrame("the link's socket is not one of packets within this machine")
        self._inlets[inlet.socket.fileno()] = inlet
        self._poller.register(inlet.socket, select.POLLIN)

    def remove(self, wire: Wire) -> None:
        for descriptor, inlet in tuple(self._inlets.items()):
            if inlet.wire is wire:
                del self._inlets[descriptor]
                with suppress(KeyError):  # it has ended
                    self._poller.unregister(descriptor)
                inlet.close()

    def sleep(self, timeout_s: float | None) -> None:
        if not self._readable:
            self._readable = self._poller.poll(None if timeout_s is None else timeout_s * 1000)

    def take(self) -> Arrival | None:
        readable = self._readable
        while True:
            if not readable:
                readable = self._readable = self._poller.poll(0)
                if not readable:
                    return None
            descriptor, _ = readable.pop()
            inlet = self._inlets.get(descriptor)
            if inlet is not None:
                return self._read(inlet, descriptor)
            if descriptor == self._bell.fileno():
                self._bell.hear()

    def tell(self, wire: Wire, grant: bytes) -> None:
        for inlet in self._inlets.values():
            if inlet.wire is wire:
                with suppress(OSError):
                    inlet.socket.send(grant, socket.MSG_DONTWAIT)

    def ring(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        self._bell.close()

    def _read(self, inlet: _Inlet, descriptor: int) -> Arrival | None:
        buffer = self._buffer
        try:
            length = _receive(inlet.socket, buffer)
        except BlockingIOError:
            return None
        except OSError:
            length = 0
        if not length:
            self._poller.unregister(descriptor)
            return END, inlet.wire, b"", NOTHING
        if buffer[0] == FRAME and _PACKET_BYTES <= length <= MAX_PACKET_BYTES:
            _, start, size = PACKET.unpack_from(buffer)
            payload = inlet.memory.get(start, size)
            if payload is not None:
                return FRAME, inlet.wire, buffer[_PACKET_BYTES:length].tobytes(), memoryview(payload)
        elif buffer[0] == HELLO:
            return HELLO, inlet.wire, buffer[1:length].tobytes(), NOTHING
        return CORRUPT, inlet.wire, b"", NOTHING


def _receive(sock: socket.socket, buffer: memoryview) -> int:
    """The next packet's length. A peer that closes with grants unread resets the socket: said once, ahead of what it
    had sent before. Raises OSError."""
    try:
        return sock.recv_into(buffer)
    except ConnectionResetError:
        return sock.recv_into(buffer)
