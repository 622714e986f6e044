"""Frames between stages of one process: for tests, and for several stages in one worker. Headers are coded as ever."""

import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from typing import ClassVar, NamedTuple

from eldric.transport.addresses import HostPort, join_address, split_address
from eldric.transport.base import Link, LinkStats, Peer, Transport, TransportOptions, TransportStats
from eldric.transport.errors import ConnectFailed, LinkClosed, ListenFailed, PeerLost, QueueFull, TransportClosed
from eldric.transport.filter import DropReason, Sender
from eldric.transport.frame import Frame, Header, Payload

_HUNG_UP = "its connection closed"


@dataclass(slots=True, eq=False, kw_only=True)
class _Wire(Sender):
    """A link as its two ends share it. Whoever changes or reads what is under way holds `changed`."""

    peer: Peer  # the receiver
    source: "InprocTransport"
    max_frames: int  # under way
    max_bytes: int
    frames: int = 0  # sent since the beginning
    bytes: int = 0
    frames_under_way: int = 0
    bytes_under_way: int = 0
    closed: str | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def open(self) -> bool:
        return self.frames_under_way < self.max_frames and self.bytes_under_way < self.max_bytes

    def sent(self, payload_bytes: int) -> None:
        self.frames += 1
        self.bytes += payload_bytes
        self.frames_under_way += 1
        self.bytes_under_way += payload_bytes

    def taken(self, payload_bytes: int) -> None:
        with self.changed:
            self.frames_under_way -= 1
            self.bytes_under_way -= payload_bytes
            self.changed.notify_all()

    def close(self, reason: str) -> bool:
        """Whether it was good until now."""
        with self.changed:
            was_good = self.closed is None
            self.closed = self.closed or reason
            self.changed.notify_all()
        return was_good


class _Arrival(NamedTuple):
    wire: _Wire
    header: bytes
    payload: memoryview


class _Hangup(NamedTuple):
    """The other end let go of the wire. Lies in the queue behind what had been sent."""

    wire: _Wire
    lost: PeerLost


class InprocLink(Link):
    """See InprocTransport."""

    def __init__(self, wire: _Wire, receiver: "InprocTransport") -> None:
        super().__init__(wire.peer)
        self._wire, self._receiver = wire, receiver

    @property
    def closed(self) -> str | None:
        return self._wire.closed

    @property
    def stats(self) -> LinkStats:
        wire = self._wire
        return LinkStats(wire.frames, wire.bytes, wire.frames_under_way, wire.bytes_under_way)

    def send(self, header: Header, payload: Payload = b"", timeout: float | None = None) -> None:
        wire = self._wire
        view = memoryview(payload)  # type: ignore[arg-type]  # arrays are buffers, which 3.11's types do not say
        data = wire.source.encode(header, wire.frames + 1, view)
        with wire.changed:
            wire.changed.wait_for(lambda: wire.open or wire.closed is not None, timeout)
            if wire.closed is not None:
                raise LinkClosed(f"the link to stage {self.peer.stage} is closed: {wire.closed}")
            if not wire.open:
                raise QueueFull(f"stage {self.peer.stage} took no frame in {timeout} s: {self.stats}")
            wire.sent(view.nbytes)
            self._receiver.deliver(_Arrival(wire, data, memoryview(view.tobytes())))

    @property
    def epoch(self) -> int:
        return self._wire.epoch

    def confirm(self, epoch: int) -> None:
        self._wire.epoch = epoch

    def close(self) -> None:
        wire = self._wire
        if wire.close("it was closed by this end"):
            key = wire.source.public_key
            self._receiver.deliver(_Hangup(wire, PeerLost(wire.stage, _HUNG_UP, inbound=True, public_key=key)))


class InprocTransport(Transport):
    """See the module. Its key keeps mistakes out, not attackers, who share the process anyway."""

    scheme = "inproc"

    _listening: ClassVar[dict[HostPort, "InprocTransport"]] = {}
    _changed: ClassVar[threading.Condition] = threading.Condition()  # of who listens, and whom they allow
    _ports: ClassVar["count[int]"] = count(1)

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        super().__init__(pipeline_id, stage, options)
        self._key = secrets.token_hex(16) if self.options.encrypt else ""
        self._allowed: frozenset[str] = frozenset()
        self._queue: SimpleQueue[_Arrival | _Hangup | None] = SimpleQueue()  # None: wake up
        self._inbound: list[_Wire] = []
        self._frames = self._bytes = self._refused = 0
        self._closed = self._woken = False
        self._on_loss: Callable[[], None] | None = None

    @property
    def public_key(self) -> str:
        return self._key

    @property
    def encryption(self) -> str:
        return "host"

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        self._check_open()
        with self._changed:
            place = HostPort(host, port or next(self._ports))
            while not port and place in self._listening:
                place = HostPort(host, next(self._ports))
            if place in self._listening:
                raise ListenFailed(f"cannot listen on {host} port {port}: in use")
            self._listening[place] = self
            self._changed.notify_all()
        return join_address(self.scheme, *place)

    def allow(self, keys: Collection[str]) -> None:
        with self._changed:
            self._allowed = frozenset(keys)
            self._changed.notify_all()

    def connect(self, peer: Peer, timeout: float = 5.0) -> Link:
        self._check_open()
        good = self._linked(peer)
        if good is not None:
            return good
        place = split_address(peer.address, self.scheme)
        with self._changed:
            self._changed.wait_for(lambda: not self._connect_problem(place, peer), timeout)
            problem = self._connect_problem(place, peer)
            if problem:
                raise ConnectFailed(f"stage {peer.stage} at {peer.address} was not reached in {timeout:g} s: {problem}")
            receiver = self._listening[place]
            link = InprocLink(receiver._accept(self, peer), receiver)
        self._links.append(link)
        return link

    def recv(self, timeout: float | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._check_open()
            frame = self.filter.released()
            if frame is None:
                lost = self.losses.take()
                if lost is not None:
                    raise lost
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    item = self._queue.get(timeout=left_s)
                except Empty:
                    return None
                if item is None:
                    self._woken = False
                    return None
                if isinstance(item, _Hangup):
                    self._hang_up(item)
                else:
                    frame = self._take(item)
            if frame is not None:
                self._frames += 1
                self._bytes += frame.payload.nbytes
                return frame

    def deliver(self, item: _Arrival | _Hangup) -> None:
        """Put something into this transport's queue. For the other ends of its wires; any thread."""
        self._queue.put(item)
        if isinstance(item, _Hangup) and self._on_loss is not None:
            self._on_loss()

    def on_loss(self, call: Callable[[], None]) -> bool:
        self._on_loss = call
        return True

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._queue.put(None)

    @property
    def stats(self) -> TransportStats:
        return TransportStats(
            frames=self._frames,
            bytes=self._bytes,
            peers=len(self._inbound),
            refused=self._refused,
            dropped=dict(self.filter.dropped),
        )

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for place in [place for place, transport in self._listening.items() if transport is self]:
                del self._listening[place]
            inbound, self._inbound = self._inbound, []
        for link in self._links:
            link.close()
        for wire in inbound:
            if wire.close(_HUNG_UP):
                lost = PeerLost(self.stage, _HUNG_UP, inbound=False, public_key=self._key)
                wire.source.deliver(_Hangup(wire, lost))

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"the transport of stage {self.stage} is closed")

    def _connect_problem(self, place: HostPort, peer: Peer) -> str:
        """Why a connection cannot be made now; empty when it can."""
        receiver = self._listening.get(place)
        if receiver is None:
            return "nobody listens there"
        if receiver.public_key != peer.public_key:
            return "it does not hold the expected key"
        return "" if receiver._is_allowed(self._key) else "it does not allow this transport's key"

    def _is_allowed(self, key: str) -> bool:
        return not self._key or key in self._allowed

    def _accept(self, source: "InprocTransport", peer: Peer) -> _Wire:
        """A wire from `source` to this transport. Called by the source's thread, with `_changed` held."""
        options = self.options
        wire = _Wire(
            stage=source.stage,
            epoch=source.epoch,
            peer=peer,
            source=source,
            max_frames=options.queue_frames,
            max_bytes=options.queue_bytes,
        )
        if source.pipeline_id != self.pipeline_id:
            wire.close(f"it refused the link: pipeline {source.pipeline_id!r}, it is of {self.pipeline_id!r}")
            self._refused += 1
        else:
            self._inbound.append(wire)
        return wire

    def _take(self, arrival: _Arrival) -> Frame | None:
        wire = arrival.wire
        wire.taken(arrival.payload.nbytes)
        if not self._is_allowed(wire.source.public_key):
            self.filter.drop(DropReason.UNKNOWN_PEER)
            return None
        return self.filter.admit(arrival.header, arrival.payload, wire)

    def _hang_up(self, hangup: _Hangup) -> None:
        wire, lost = hangup
        if lost.inbound:
            with self._changed:
                self._inbound = [other for other in self._inbound if other is not wire]
        if not lost.inbound or self._is_allowed(lost.public_key):
            self.losses.add(lost, wire)
