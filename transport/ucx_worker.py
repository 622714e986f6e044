"""One UCX worker: messages by tag, from buffers that are used again, and a thread that moves them meanwhile.

A UCX worker does nothing but when it is called. Who waits for frames calls it; while the stage computes, the pump does.
Layout of a message: its kind (1 byte), 3 unused, length of the header (4 bytes, little-endian), length of the payload
(8 bytes); the header; at the next multiple of 64 the payload. Where that takes more than SMALL_BYTES, the payload
follows as a message of its own under another tag, so that whoever receives can have a buffer ready for what comes next.
"""

import math
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np

from eldric.transport.bell import Bell
from eldric.transport.spin import give_way

os.environ.setdefault("UCX_LOG_FILE", "stderr")  # else it writes to standard output, which is not its own
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
try:
    from ucxx._lib import libucxx as libucxx
    from ucxx._lib.arr import Array as Array
except ImportError as error:
    raise ImportError(f"UCX is not installed: pip install 'eldric[ucx]' ({error})") from error

PREFIX = struct.Struct("<B3xIQ")
_ALIGNMENT = 64
#: Up to here a message carries its payload, and goes at once. What is larger waits until the receiver asks for it:
#: a round trip more, and the receiver's time. UCX by itself makes messages of 16 KiB wait.
SMALL_BYTES = 288 * 1024
_PUSH_S = 0.0005  # how long a sender moves a large message itself before the pump does
_ATTENDED_S = 0.001  # who looked for frames that recently needs no pump
_LOOK_S = 0.005  # between two looks of the pump whether it is needed
_BUSY_S = 0.0002  # between two times that it moves messages that are on their way
_CLOSE_S = 0.05  # longest wait for ways to other workers to close
_SENDING_S = 0.001  # longest sleep while messages are on their way
_IDLE_S = 0.5  # longest wait for a message
_MAX_SMALL_BYTES = 4096  # of a message without payload: a receiver's grant
_VERSION_MASK = 0x0F  # of a UCX address's first byte: UCX ends the process for one of a version that it does not know
_KEPT_BUFFERS = 4  # of each size
_KEPT_SIZES = 8


class Outgoing:
    """A buffer that messages of one size are sent from. UCX keeps its memory registered while it lives."""

    __slots__ = ("array", "memory", "view")

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size, np.uint8)
        self.view = memoryview(self.memory.data)
        self.array = Array(self.memory)


#: A request of UCX's, and the memory that it reads or writes until it is completed. Neither may be let go before.
Request: TypeAlias = tuple[Any, Any]


class Endpoint:
    """A way to another worker. What has been sent by it and is not gone yet, and what comes back by it."""

    def __init__(self, handle: Any, tag: int) -> None:
        self.handle, self.tag, self.rest_tag = handle, libucxx.UCXXTag(tag), libucxx.UCXXTag(tag ^ 1)
        self.sends: deque[tuple[Any, Outgoing]] = deque()
        self.incoming: Request | None = None

    def close(self) -> list[Request]:
        """Begin to close it: gives UCX's requests, which its worker's progress completes.

        UCX's ways that block wait for a dead peer for ever.
        """
        handle, self.handle = self.handle, None
        left = [*self.sends, *([self.incoming] if self.incoming else [])]
        self.sends.clear()
        return [*left, (handle.close(), None)]


class Worker:
    """`lock` is held by every method that touches UCX; `ring` needs none."""

    def __init__(self, collect: Callable[[bool], bool]) -> None:
        """collect: takes one message, or all that have come, off the worker, and tells whether there was any. Called
        with the lock held."""
        context = libucxx.UCXContext(
            {"RNDV_THRESH": str(SMALL_BYTES)}, feature_flags=(libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        )
        self._worker: Any = libucxx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self.address: bytes = self._worker.address.tobytes()
        self.lock = threading.Lock()
        self._collect = collect
        self._endpoints: list[Endpoint] = []
        self._own: Any = None  # a way to this very worker
        self._left: list[Request] = []  # that nobody waits for
        self._retiring: list[tuple[Endpoint, float, Callable[[], None]]] = []
        self._free: dict[int, list[Outgoing]] = {}
        self._attended = 0.0
        self._sleeping = False
        self._bell = Bell()
        self._poller = select.poll()
        self._poller.register(self._bell, select.POLLIN)
        self._poller.register(self._worker.epoll_file_descriptor, select.POLLIN)
        self._pump_bell = Bell()
        self._stop = False
        self._pump = threading.Thread(target=self._run, name="eldric-transport-pump", daemon=True)
        self._pump.start()

    def connect(self, address: bytes, tag: int) -> Endpoint:
        """A way to the worker of that address, on which messages carry that tag.

        Without UCX's own error handling, which would rule shared memory out: the door knows who is gone.
        Raises libucxx.UCXError, RuntimeError, and ValueError for what is no address. UCX does not survive everything
        that looks like one; whoever is let in at the door is trusted with that.
        """
        if not address or (address[0] ^ self.address[0]) & _VERSION_MASK:
            raise ValueError("it is no address of a UCX worker like this one")
        with self.lock:
            there = libucxx.UCXAddress.create_from_buffer(address)
            endpoint = Endpoint(self._worker.create_endpoint_from_worker_address(there, False), tag)
            self._endpoints.append(endpoint)
        return endpoint

    def send(self, endpoint: Endpoint, kind: int, header: bytes, payload: memoryview) -> None:
        """Copy a message and send it. Never waits for the peer."""
        header_bytes, payload_bytes = len(header), payload.nbytes
        begin = payload_begin(header_bytes)
        size = begin + payload_bytes
        if payload_bytes and (payload.format != "B" or payload.ndim != 1):
            payload = payload.cast("B")
        with self.lock:
            buffer = self._buffer(size if size <= SMALL_BYTES else begin)
            view = buffer.view
            PREFIX.pack_into(view, 0, kind, header_bytes, payload_bytes)
            view[PREFIX.size : PREFIX.size + header_bytes] = header
            if payload_bytes and size <= SMALL_BYTES:
                view[begin:] = payload
            endpoint.sends.append((endpoint.handle.tag_send(buffer.array, endpoint.tag), buffer))
            if size > SMALL_BYTES:
                buffer = self._buffer(payload_bytes)
                buffer.view[:] = payload
                endpoint.sends.append((endpoint.handle.tag_send(buffer.array, endpoint.rest_tag), buffer))
            self._worker.progress()
            self._settle(endpoint)
        if endpoint.sends:
            self._push(endpoint)

    def move(self) -> None:
        """Take what has come, send on what has not gone. With the lock held."""
        self._worker.progress()
        self._collect(True)
        self._tidy()

    def _tidy(self) -> None:
        for endpoint in self._endpoints:
            if endpoint.sends:
                self._settle(endpoint)
        if self._retiring:
            self._let_go(time.monotonic())

    def attend(self) -> None:
        """As `move`, for the thread that waits for frames: one at a time, and no more than that while there is one."""
        self._attended = time.monotonic()
        with self.lock:
            self._worker.progress()
            if not self._collect(False) or self._retiring:
                self._tidy()

    def sleep(self, timeout_s: float | None) -> None:
        """Until something has come or may be sent, or the bell is rung, or for a while."""
        self._sleeping = True
        try:
            with self.lock:
                armed = self._worker.arm()
                longest_s = _SENDING_S if any(endpoint.sends for endpoint in self._endpoints) else _IDLE_S
            if armed:
                wait_s = longest_s if timeout_s is None else min(timeout_s, longest_s)
                for descriptor, _ in self._poller.poll(wait_s * 1000):
                    if descriptor == self._bell.fileno():
                        self._bell.hear()
        finally:
            self._sleeping = False

    def probe(self, tag: Any) -> int | None:
        """Length of the next message with that tag. With the lock held."""
        found = self._worker.tag_probe(tag)
        return found.length if found.matched else None

    def receive(self, array: Any, tag: Any) -> Any:
        """Start to receive the next message with that tag into an Array. With the lock held. Gives UCX's request."""
        return self._worker.tag_recv(array, tag)

    def recall(self, receiving: Request, tag: Any) -> None:
        """End what waits for a message with that tag, by one of our own: UCX has no other way that ends nothing else.

        With the lock held. Where UCX finds no way from a worker to itself, it stays until `close`.
        """
        self.leave([receiving])
        with suppress(libucxx.UCXError, RuntimeError):
            if self._own is None:
                there = libucxx.UCXAddress.create_from_buffer(self.address)
                self._own = self._worker.create_endpoint_from_worker_address(there, False)
            nothing = Array(np.zeros(1, np.uint8))
            self.leave([(self._own.tag_send(nothing, tag), nothing)])

    def take(self, endpoint: Endpoint) -> bytes | None:
        """The header of the next message with the endpoint's tag, without payload; empty: it is none of this protocol.

        None: there is none.
        """
        with self.lock:
            self._worker.progress()
            if endpoint.incoming is None:
                size = self.probe(endpoint.tag)
                if size is None:
                    return None
                memory = np.empty(size if size <= _MAX_SMALL_BYTES else 1, np.uint8)  # UCX cuts off the rest
                endpoint.incoming = self.receive(Array(memory), endpoint.tag), memory
            request, memory = endpoint.incoming
            if not request.completed:
                return None
            endpoint.incoming = None
        data: bytes = memory.tobytes()
        if len(data) < PREFIX.size:
            return b""
        return data[PREFIX.size : PREFIX.size + PREFIX.unpack_from(data)[1]]

    def leave(self, requests: Iterable[Request]) -> None:
        """Nobody waits for these any more. With the lock held."""
        self._left = [each for each in (*self._left, *requests) if each[0] and not each[0].completed]

    def retire(self, endpoint: Endpoint, deadline: float, then: Callable[[], None]) -> None:
        """Let go of it once all that was sent is gone, at the latest at the deadline, and call `then`."""
        with self.lock:
            self._retiring.append((endpoint, deadline, then))
            self.move()

    def drain(self, deadline: float) -> None:
        """Wait until all that retire have gone."""
        while self._retiring and time.monotonic() < deadline:
            self.attend()
            give_way()

    def _let_go(self, now: float) -> None:
        for entry in tuple(self._retiring):
            endpoint, deadline, then = entry
            if not endpoint.sends or now > deadline:
                self._retiring.remove(entry)
                if endpoint in self._endpoints:
                    self._endpoints.remove(endpoint)
                    self.leave(endpoint.close())
                then()

    def ring(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        self._stop = True
        self._pump_bell.ring()
        self._pump.join()
        with self.lock:
            self._let_go(math.inf)
            for endpoint in self._endpoints:
                self.leave(endpoint.close())
            end = time.monotonic() + _CLOSE_S
            while time.monotonic() < end and self._left:
                self._worker.progress()
                self.leave(())
            self._endpoints.clear()
            self._own = None
            self._worker.cancel_inflight_requests()
            memories = [memory for _, memory in self._left]
            self._left.clear()
            self._worker = None
            memories.clear()
            self._free.clear()
        self._bell.close()
        self._pump_bell.close()

    def _buffer(self, size: int) -> Outgoing:
        free = self._free.get(size)
        return free.pop() if free else Outgoing(size)

    def _settle(self, endpoint: Endpoint) -> None:
        """Take the buffers of what is gone back."""
        sends = endpoint.sends
        while sends and sends[0][0].completed:
            _, buffer = sends.popleft()
            size = len(buffer.view)
            free = self._free.setdefault(size, [])
            if len(free) < _KEPT_BUFFERS:
                free.append(buffer)
            if len(self._free) > _KEPT_SIZES:
                del self._free[next(iter(self._free))]

    def _push(self, endpoint: Endpoint) -> None:
        end = time.monotonic() + _PUSH_S
        while endpoint.sends and time.monotonic() < end:
            with self.lock:
                self.move()
            give_way()

    def _run(self) -> None:
        """The pump."""
        poller = select.poll()
        poller.register(self._pump_bell, select.POLLIN)
        poller.register(self._worker.epoll_file_descriptor, select.POLLIN)
        while not self._stop:
            wait_s, awake = _LOOK_S, True
            if not self._sleeping and time.monotonic() - self._attended > _ATTENDED_S:
                with self.lock:
                    self.move()
                    if any(endpoint.sends for endpoint in self._endpoints):
                        wait_s = _BUSY_S
                    else:
                        awake = not self._worker.arm()
                if self._sleeping:  # it fell asleep just now, and what it waits for may be here already
                    self._bell.ring()
            if awake:
                time.sleep(wait_s)
            else:
                poller.poll(_IDLE_S * 1000)


def payload_begin(header_bytes: int) -> int:
    """Where the payload of a message begins."""
    return -(-(PREFIX.size + header_bytes) // _ALIGNMENT) * _ALIGNMENT
