"""The receiving end of ucx: messages of each inbound wire carry its tag; grants go back with the same."""

import struct
import time
from collections import deque
from typing import Any

import numpy as np

from eldric.transport.base import TransportOptions
from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import MAX_HEADER_BYTES
from eldric.transport.mailbox import CORRUPT, END, FRAME, HELLO, NOTHING, Arrival, Mailbox
from eldric.transport.opening import Wire
from eldric.transport.spin import give_way
from eldric.transport.ucx_worker import PREFIX, SMALL_BYTES, Array, Endpoint, Worker, libucxx, payload_begin

#: What a sender says of itself at the door: the tag of its link, and behind it its worker's address.
TAG = struct.Struct("<Q")
GRANT = 5  # kind of a message that goes from receiver to sender, after those of mailbox.py

_SPARE_MESSAGES = 16  # hellos, beside the frames of a window
_LAST_S = 0.02  # for what a peer that is gone had sent to come out of the kernel
_KINDS = frozenset({FRAME, HELLO, END, CORRUPT})
_NO_PREFIX = b"\xff" * PREFIX.size  # of no kind, and with a header that is too long


class _Inlet:
    """One inbound wire, the message of it that is being received, and what waits to be taken."""

    __slots__ = (
        "array",
        "arrived",
        "arrived_bytes",
        "back",
        "begun",
        "request",
        "rest",
        "taken",
        "taken_bytes",
        "view",
        "wire",
    )

    def __init__(self, wire: Wire, back: Endpoint) -> None:
        self.wire, self.back = wire, back
        memory = np.zeros(SMALL_BYTES, np.uint8)  # for every message; what is shorter leaves older bytes of its sender
        self.array, self.view = Array(memory), memoryview(memory.data)
        self.view[: PREFIX.size] = _NO_PREFIX
        self.request: Any = None  # that receives a message into it
        self.begun: tuple[int, bytes, int] | None = None  # kind, header, payload's length: the payload is to follow
        self.rest: tuple[Any, np.ndarray[Any, Any]] | None = None  # the request that receives the payload, and to where
        self.arrived = self.arrived_bytes = 0  # messages and their payloads; counted by whoever holds the worker's lock
        self.taken = self.taken_bytes = 0  # by the transport's thread


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
            self._inlets[wire] = _Inlet(wire, back)

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

    def _collect(self, everything: bool) -> bool:
        """Called by the worker, which holds its lock."""
        found = False
        for inlet in self._inlets.values():
            while self._advance(inlet):
                found = True
                if not everything:
                    return True
        return found

    def _has_room(self, inlet: _Inlet) -> bool:
        waiting, waiting_bytes = inlet.arrived - inlet.taken, inlet.arrived_bytes - inlet.taken_bytes
        return waiting < self._most and waiting_bytes < self._most_bytes

    def _advance(self, inlet: _Inlet) -> bool:
        """Whether a message came whole, so that there may be another."""
        if inlet.begun is not None:
            return self._advance_rest(inlet, *inlet.begun)
        request = inlet.request
        if request is None:
            if not self._has_room(inlet):
                return False
            inlet.request = request = self.worker.receive(inlet.array, inlet.back.tag)
        if not request.completed:
            return False
        inlet.request = None
        view = inlet.view
        kind, header_bytes, payload_bytes = PREFIX.unpack_from(view)
        view[: PREFIX.size] = _NO_PREFIX
        if request.status or kind not in _KINDS or header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_bytes:
            return self._arrive(inlet, CORRUPT, b"", NOTHING)
        begin = payload_begin(header_bytes)
        end = begin + payload_bytes
        header = view[PREFIX.size : PREFIX.size + header_bytes].tobytes()
        if end <= SMALL_BYTES:
            return self._arrive(inlet, kind, header, memoryview(view[begin:end].tobytes()))
        inlet.begun = kind, header, payload_bytes
        return self._advance_rest(inlet, kind, header, payload_bytes)

    def _advance_rest(self, inlet: _Inlet, kind: int, header: bytes, payload_bytes: int) -> bool:
        if inlet.rest is None:
            size = self.worker.probe(inlet.back.rest_tag)
            if size is None:
                return False
            memory = np.empty(size if size <= self._max_bytes else 1, np.uint8)  # UCX cuts off the rest
            inlet.rest = self.worker.receive(Array(memory), inlet.back.rest_tag), memory
        request, memory = inlet.rest
        if not request.completed:
            return False
        inlet.begun = inlet.rest = None
        if memory.nbytes != payload_bytes:
            return self._arrive(inlet, CORRUPT, b"", NOTHING)
        return self._arrive(inlet, kind, header, memory.data.toreadonly())

    def _arrive(self, inlet: _Inlet, kind: int, header: bytes, payload: memoryview) -> bool:
        inlet.arrived += 1
        inlet.arrived_bytes += payload.nbytes
        self._arrived.append((kind, inlet.wire, header, payload))
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
            self.worker.recall((inlet.request, inlet.array), inlet.back.tag)
        if inlet.rest is not None:
            self.worker.leave([inlet.rest])
