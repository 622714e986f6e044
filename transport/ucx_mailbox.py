"""The receiving end of ucx: messages of each inbound wire carry its tag; grants go back with the same."""

import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import MAX_HEADER_BYTES
from eldric.transport.mailbox import CORRUPT, END, FRAME, HELLO, NOTHING, Arrival, Mailbox
from eldric.transport.opening import Wire
from eldric.transport.spin import give_way
from eldric.transport.ucx_worker import PREFIX, Endpoint, Worker, libucxx, payload_begin

#: What a sender says of itself at the door: the tag of its link, and behind it its worker's address.
TAG = struct.Struct("<Q")
GRANT = 5  # kind of a message that goes from receiver to sender, after those of mailbox.py

_LAST_S = 0.02  # for what a peer that is gone had sent to come out of the kernel
_KINDS = frozenset({FRAME, HELLO, END, CORRUPT})


@dataclass(slots=True, eq=False)
class _Inlet:
    """One inbound wire, and the message of it that is being received."""

    wire: Wire
    tag: Any
    back: Endpoint
    memory: "np.ndarray[Any, Any]" = field(default_factory=lambda: np.empty(0, np.uint8))
    request: Any = None


class UcxMailbox(Mailbox):
    """See the module."""

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_bytes = payload_begin(MAX_HEADER_BYTES) + max_payload_bytes
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
            self.worker.retire(inlet.back, 0.0, lambda: None)

    def sleep(self, timeout_s: float | None) -> None:
        if not self._arrived:
            self.worker.sleep(timeout_s)

    def take(self) -> Arrival | None:
        if not self._arrived:
            self.worker.attend()
        return self._arrived.popleft() if self._arrived else None

    def take_last(self) -> Arrival | None:
        end = time.monotonic() + _LAST_S
        while not self._arrived and time.monotonic() < end:
            self.worker.attend()
            give_way()
        return self._arrived.popleft() if self._arrived else None

    def tell(self, wire: Wire, grant: bytes) -> None:
        inlet = self._inlets.get(wire)
        if inlet is not None:
            self.worker.send(inlet.back, GRANT, grant, NOTHING)

    def ring(self) -> None:
        self.worker.ring()

    def close(self) -> None:
        with self.worker.lock:
            self._inlets.clear()
        self._arrived.clear()
        self.worker.close()

    def _collect(self) -> None:
        """Called by the worker, which holds its lock."""
        for inlet in self._inlets.values():
            while self._advance(inlet):
                pass

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
        self._arrived.append(_arrival(inlet.wire, memory.data.toreadonly()))
        return True


def _arrival(wire: Wire, message: memoryview) -> Arrival:
    if message.nbytes >= PREFIX.size:
        kind, header_bytes, payload_bytes = PREFIX.unpack_from(message)
        begin = payload_begin(header_bytes)
        if kind in _KINDS and begin + payload_bytes == message.nbytes:
            header = message[PREFIX.size : PREFIX.size + header_bytes].tobytes()
            return kind, wire, header, message[begin:]
    return CORRUPT, wire, b"", NOTHING
