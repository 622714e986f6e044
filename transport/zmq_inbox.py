"""The receiving end of a ZeroMQ transport: one ROUTER for all peers that send to this stage."""

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import zmq
from google.protobuf.message import DecodeError

from eldric.transport.base import TransportOptions, TransportStats
from eldric.transport.errors import ListenFailed, PeerLost
from eldric.transport.filter import DropReason, FrameFilter, Sender
from eldric.transport.frame import MAX_HEADER_BYTES, Frame
from eldric.transport.hello import hello_problem
from eldric.transport.losses import Losses
from eldric.transport.spin import Spinner
from eldric.transport.window import ReceiveWindow
from eldric.transport.zmq_guard import (
    HANDSHAKE_FAILURES,
    Doorbell,
    Guard,
    ZmqContext,
    ZmqKeys,
    high_water_mark,
    set_options,
)
from eldric.v1 import frame_pb2

logger = logging.getLogger(__name__)

_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # enumerations are slow


@dataclass(slots=True, eq=False, kw_only=True)
class _Sender(Sender):
    """A peer that is connected to us and said hello."""

    routing_id: bytes
    key: str
    connection: int  # numbered by _on_router_event
    window: ReceiveWindow


class ZmqInbox:
    """Frames of all peers, the ends of lost ones, and wakes, in one place to wait at.

    `wake`, `look`, `allow` and `stats` may be called from any thread, all else by the transport's.
    """

    def __init__(
        self,
        context: ZmqContext,
        guard: Guard,
        door: FrameFilter,
        losses: Losses,
        options: TransportOptions,
        keys: ZmqKeys | None,
    ) -> None:
        self._guard, self._filter, self._losses = guard, door, losses
        self._options, self._encrypted = options, keys is not None
        self._allowed: frozenset[str] = frozenset()
        self._senders: dict[bytes, _Sender] = {}
        self._by_connection: dict[int, _Sender] = {}
        self._ended: deque[int] = deque()  # connections
        self._accepted = 0
        self._connections: dict[int, int] = {}  # last connection of each file descriptor. By the guard's thread
        self._frames = self._bytes = self._refused_keys = self._refused_hellos = 0
        self._woken = False
        self._timeout_ms = -1
        self._spinner = Spinner(options.spin_s)
        self._router = self._make_router(context, keys)
        self._bell_id = b"\1" + secrets.token_bytes(16)  # no peer can guess it, and so ring in our name
        self._bell = Doorbell(context, zmq.DEALER, "inproc://inbox", self._bell_id)

    def bind(self, endpoint: str) -> int:
        """Listen; gives the port. Raises ListenFailed."""
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            raise ListenFailed(f"cannot listen on {endpoint}: {error}") from error
        return int(str(self._router.get_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])

    def allow(self, keys: Collection[str]) -> None:
        self._allowed = frozenset(keys)

    def is_allowed(self, key: str) -> bool:
        return key in self._allowed

    def recv(self, timeout: float | None) -> Frame | None:
        """As Transport.recv."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self._filter.released()
            if frame is None:
                routing_id = self._first_part(deadline)
                if routing_id is None:
                    self._raise_lost()
                    if deadline is not None and time.monotonic() >= deadline:
                        return None
                    continue
                if routing_id == self._bell_id:
                    self._router.recv()
                    if self._woken:
                        self._woken = False
                        return None
                    continue
                sender = self._senders.get(routing_id)
                if sender is None:
                    self._greet(routing_id)
                    continue
                frame = self._take(sender)
            if frame is not None:
                self._frames += 1
                self._bytes += frame.payload.nbytes
                return frame

    def wake(self) -> None:
        if not self._woken:  # else the bell that was rung then is still to be heard
            self._woken = True
            self._bell.ring()

    def settle(self) -> None:
        """Tell every peer what was taken of it."""
        for sender in self._senders.values():
            if not sender.window.is_told:
                self._tell(sender.routing_id, sender.window.grant())

    def look(self) -> None:
        """Make recv look at the losses. Any thread."""
        self._bell.ring()

    @property
    def stats(self) -> TransportStats:
        return TransportStats(
            frames=self._frames,
            bytes=self._bytes,
            peers=len(self._senders),
            refused=self._refused_keys + self._refused_hellos,
            dropped=dict(self._filter.dropped),
        )

    def discard(self) -> None:
        """Take what has come, so that peers that close may go on, and forget it."""
        with suppress(PeerLost):
            while self.recv(0) is not None:
                pass

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """For polling."""
        return self._router

    def close(self) -> None:
        self._router.disable_monitor()
        self._router.close()
        self._bell.close()

    def _make_router(self, context: ZmqContext, keys: ZmqKeys | None) -> zmq.Socket[bytes]:
        options = self._options
        router = context.socket(zmq.ROUTER)
        set_options(router, options.silence_s)
        router.rcvhwm = high_water_mark(options.queue_frames)
        router.maxmsgsize = options.max_payload_bytes + MAX_HEADER_BYTES
        if keys is not None:
            router.curve_server = True
            router.curve_publickey, router.curve_secretkey = keys
            router.zap_domain = b"eldric"
            router.zap_enforce_domain = True  # nobody gets in should the guard be gone
        self._guard.watch(router, self._on_router_event)
        router.bind("inproc://inbox")
        return router

    def _on_router_event(self, event: zmq.Event, value: int) -> None:
        """In the guard's thread."""
        if event in HANDSHAKE_FAILURES:
            self._refused_keys += 1
        elif event == zmq.EVENT_ACCEPTED:
            self._accepted += 1
            self._connections[value] = self._accepted
        elif event == zmq.EVENT_DISCONNECTED:
            self._ended.append(self._connections.get(value, 0))
            self._bell.ring()

    def _first_part(self, deadline: float | None) -> bytes | None:
        """The routing id of the next message; None at the deadline, or when a loss is to be reported first."""
        if self._ended or self._losses:
            return self._sleep(0)
        if self._spinner.wait(self._is_readable, deadline):
            return self._router.recv()
        timeout_ms = -1 if deadline is None else max(0, math.ceil((deadline - time.monotonic()) * 1000))
        first = self._sleep(timeout_ms)
        self._spinner.slept()
        return first

    def _is_readable(self) -> int:
        return int(self._router.get(_EVENTS)) & _POLLIN

    def _sleep(self, timeout_ms: int) -> bytes | None:
        if timeout_ms != self._timeout_ms:
            self._router.rcvtimeo = self._timeout_ms = timeout_ms
        try:
            return self._router.recv()
        except zmq.Again:
            return None

    def _take(self, sender: _Sender) -> Frame | None:
        """The rest of a message from a known sender. None when it is no frame for us, or not yet."""
        router = self._router
        header = router.recv(copy=False)  # as objects, because asking a socket for RCVMORE costs more than they do
        if not header.more:
            self._greet_again(sender, header.bytes)
            return None
        part = router.recv(copy=False)
        payload = part.buffer
        frame = None
        if part.more:
            self._skip_parts()
            self._filter.drop(DropReason.CORRUPT)
        elif self._encrypted and sender.key not in self._allowed:
            self._filter.drop(DropReason.UNKNOWN_PEER)
        else:
            frame = self._filter.admit(header.bytes, payload, sender)
        if sender.window.taken(payload.nbytes):
            self._tell(sender.routing_id, sender.window.grant())
        return frame

    def _greet(self, routing_id: bytes) -> None:
        """The first message of a connection: a hello, or nothing that we know."""
        part = self._router.recv(copy=False)
        if part.more:
            self._skip_parts()
            self._filter.drop(DropReason.UNKNOWN_PEER)
            return
        key = str(part.get("User-Id")) if self._encrypted else ""
        if self._encrypted and key not in self._allowed:  # it was when it connected
            self._filter.drop(DropReason.UNKNOWN_PEER)
            return
        try:
            hello = frame_pb2.LinkHello.FromString(part.bytes)
        except DecodeError:
            self._filter.drop(DropReason.CORRUPT)
            return
        problem = hello_problem(hello, self._filter.pipeline_id)
        if problem is not None:
            self._refused_hellos += 1
            logger.warning("link refused pipeline=%s: %s", self._filter.pipeline_id, problem)
            self._tell(routing_id, frame_pb2.LinkGrant(refused=problem).SerializeToString())
            return
        window = ReceiveWindow(self._options.queue_frames, self._options.queue_bytes)
        self._guard.catch_up()  # or the descriptor may still stand for the connection that had it before
        connection = self._connections[int(part.get(zmq.SRCFD))]
        self._enter(
            _Sender(
                stage=hello.from_stage,
                epoch=hello.epoch,
                routing_id=routing_id,
                key=key,
                connection=connection,
                window=window,
            )
        )
        self._tell(routing_id, window.grant())

    def _greet_again(self, sender: _Sender, data: bytes) -> None:
        """A known sender's link goes on in a new epoch, or is about to close."""
        try:
            hello = frame_pb2.LinkHello.FromString(data)
        except DecodeError:
            hello = frame_pb2.LinkHello()
        if hello_problem(hello, self._filter.pipeline_id) is None and hello.from_stage == sender.stage:
            sender.epoch = hello.epoch
            self._tell(sender.routing_id, sender.window.grant())
        else:
            self._filter.drop(DropReason.CORRUPT)

    def _enter(self, sender: _Sender) -> None:
        before = self._by_connection.get(sender.connection)
        if before is not None:  # it had gone by the time it was greeted, and was given its successor's number
            self._leave(before)
        self._senders[sender.routing_id] = self._by_connection[sender.connection] = sender

    def _leave(self, sender: _Sender) -> None:
        del self._senders[sender.routing_id], self._by_connection[sender.connection]
        if not self._encrypted or sender.key in self._allowed:
            reason = f"its connection closed, or it was silent for {self._options.silence_s:g} s"
            self._losses.add(PeerLost(sender.stage, reason, inbound=True, public_key=sender.key), sender)

    def _raise_lost(self) -> None:
        """Report the next peer of this epoch that went away, if there is one."""
        while self._ended:
            sender = self._by_connection.get(self._ended.popleft())
            if sender is not None:
                self._leave(sender)
        lost = self._losses.take()
        if lost is not None:
            raise lost

    def _skip_parts(self) -> None:
        while self._router.recv(copy=False).more:
            pass

    def _tell(self, routing_id: bytes, grant: bytes) -> None:
        """A ROUTER drops what cannot go out, and never waits. The next grant makes up for a lost one."""
        self._router.send_multipart((routing_id, grant), zmq.NOBLOCK)
