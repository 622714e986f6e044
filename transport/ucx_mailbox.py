"""The receiving end of ucx: messages of each inbound wire carry its tag; grants go back with the same."""

import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eldric.transport.base import TransportOptions
from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import MAX_HEADER_BYTES
from eldric.transport.mailbox import CORRUPT, END, FRAME, HELLO, NOTHING, Arrival, Mailbox
from eldric.transport.opening import Wire
from eldric.transport.spin import give_way
from eldric.transport.ucx_worker import PREFIX, Endpoint, Worker, libucxx, payload_begin

#: What a sender says of itself at the door: the tag of its link, and behind it its worker's address.
TAG = struct.Struct("<Q")
GRANT = 5  # kind of a message that goes from receiver to sender, after those of mailbox.py

_SPARE_MESSAGES = 16  # hellos, beside the frames of a window
_LAST_S = 0.02  # for what a peer that is gone had sent to come out of the kernel
_KINDS = frozenset({FRAME, HELLO, END, CORRUPT})


@dataclass(slots=True, eq=False)
class _Inlet:
    """One inbound wire, the message of it that is being received, and what waits to be taken."""

    wire: Wire
    tag: Any
    back: Endpoint
    memory: "np.ndarray[Any, Any]" = field(default_factory=lambda: np.empty(0, np.uint8))
    request: Any = None
    arrived: int = 0  # messages and their bytes; counted by whoever holds the worker's lock
    arrived_bytes: int = 0
    taken: int = 0  # by the transport's thread
    taken_bytes: int = 0


class UcxMailbox(Mailbox):
    """See the module. Of what a peer sends beyond its window, nothing is taken from UCX."""

    def __init__(self, options: TransportOptions) -> None:
        self._max_bytes = payload_begin(MAX_HEADER_BYTES) + options.max_payload_bytes
        self._most, self._most_bytes = options.queue_frames + _SPARE_MESSAGES, options.queue_bytes
        self._inlets: dict[Wire, _Inlet] = {}
        self._refused: dict[Wire, CorruptFrame] = {}
        self._arrived: deque[Arrival] = deque()
        self.worker = Worker(self._collect)
        self.address = self.worker.address

    def expect(self, wire: Wire) -> None:
        """At once, because large messages are not on their way before they are asked for."""
        try:
            self._admit(wire)
        except CorruptFrame as error:
            self._refused[wire] = error

    def add(self, wire: Wire) -> None:
        error = self._refused.pop(wire, None)
        if error is not None:
            raise error

    def _admit(self, wire: Wire) -> None:
        if len(wire.address) <= TAG.size:
            raise CorruptFrame("the link came without the address of a UCX worker")
        (tag,) = TAG.unpack_from(wire.address)
        try:
            back = self.worker.connect(wire.address[TAG.size :], tag)
        except (libucxx.UCXError, ValueError, RuntimeError) as error:
            raise CorruptFrame(f"no way back to the UCX worker of the link: {error}") from error
        with self.worker.lock:
            self._inlets[wire] = _Inlet(wire, back.tag, back)

    def remove(self, wire: Wire) -> None:
        with self.worker.lock:
            inlet = self._inlets.pop(wire, None)
            if inlet is not None:
                self._let_go(inlet)
        if inlet is not None:
            self.worker.retire(inlet.back, 0.0, lambda: None)

    def sleep(self, timeout_s: float | None) -> None:
        if not self._arrived:
            self.worker.sleep(timeout_s)

    def take(self) -> Arrival | None:
        if not self._arrived:
            self.worker.attend()
        return self._take() if self._arrived else None

    def take_last(self) -> Arrival | None:
        end = time.monotonic() + _LAST_S
        while not self._arrived and time.monotonic() < end:
            self.worker.attend()
            give_way()
        return self._take() if self._arrived else None

    def tell(self, wire: Wire, grant: bytes) -> None:
        inlet = self._inlets.get(wire)
        if inlet is not None:
            self.worker.send(inlet.back, GRANT, grant, NOTHING)

    def ring(self) -> None:
        self.worker.ring()

    def close(self) -> None:
        with self.worker.lock:
            for inlet in self._inlets.values():
                self._let_go(inlet)
            self._inlets.clear()
        self._arrived.clear()
        self.worker.close()

    def _collect(self) -> None:
        """Called by the worker, which holds its lock."""
        for inlet in self._inlets.values():
            while self._has_room(inlet) and self._advance(inlet):
                pass

    def _has_room(self, inlet: _Inlet) -> bool:
        waiting, waiting_bytes = inlet.arrived - inlet.taken, inlet.arrived_bytes - inlet.taken_bytes
        return waiting < self._most and waiting_bytes < self._most_bytes

    def _advance(self, inlet: _Inlet) -> bool:
        """Whether a message came whole, so that there may be another."""
        if inlet.request is None:
            size = self.worker.probe(inlet.tag)
            if size is None:
                return False
            inlet.memory = np.empty(size if size <= self._max_bytes else 1, np.uint8)  # UCX cuts off the rest
            inlet.request = self.worker.receive(inlet.memory, inlet.tag)
        if not inlet.request.completed:
            return False
        inlet.request, memory = None, inlet.memory
        arrival = _arrival(inlet.wire, memory.data.toreadonly())
        inlet.arrived += 1
        inlet.arrived_bytes += arrival[3].nbytes
        self._arrived.append(arrival)
        return True

    def _take(self) -> Arrival:
        arrival = self._arrived.popleft()
        inlet = self._inlets.get(arrival[1])
        if inlet is not None:
            inlet.taken += 1
            inlet.taken_bytes += arrival[3].nbytes
        return arrival

    def _let_go(self, inlet: _Inlet) -> None:
        """With the worker's lock held. What is being received may still be written to."""
        if inlet.request is not None:
            self.worker.leave([(inlet.request, inlet.memory)])


def _arrival(wire: Wire, message: memoryview) -> Arrival:
    if message.nbytes >= PREFIX.size:
        kind, header_bytes, payload_bytes = PREFIX.unpack_from(message)
        begin = payload_begin(header_bytes)
        if kind in _KINDS and begin + payload_bytes == message.nbytes:
            header = message[PREFIX.size : PREFIX.size + header_bytes].tobytes()
            return kind, wire, header, message[begin:]
    return CORRUPT, wire, b"", NOTHING
