"""The sending end of a ZeroMQ link: one DEALER, one connection, never made again by itself."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq
from google.protobuf.message import DecodeError

from eldric.transport.base import Link, LinkStats, Peer, TransportOptions
from eldric.transport.errors import ConnectFailed, LinkClosed, QueueFull
from eldric.transport.frame import Header, Payload
from eldric.transport.round_trip import tcp_round_trip_s
from eldric.transport.window import FIRST_WINDOW_FRAMES, SendWindow
from eldric.transport.zmq_guard import HANDSHAKE_FAILURES, Guard, ZmqContext, ZmqKeys, high_water_mark, set_options
from eldric.v1 import frame_pb2

MAX_GRANT_BYTES = 4096
_FIRST_PART = int(zmq.NOBLOCK | zmq.SNDMORE)  # put together once: each `|` of flags takes half a microsecond
SLICE_S = 0.02  # a sender that waits for room looks this often whether its peer was lost
RETRY_S = 0.05  # between two tries to connect


class Connection:
    """What the guard saw of a link's connection. Written by the guard's thread, read by the link's."""

    def __init__(self, silence_s: float, on_lost: "OnLost") -> None:
        self.settled = threading.Event()  # connected, or closed
        self.connected = False
        self.closed: str | None = None
        self.epoch = 0  # of the link
        self.descriptor = -1  # of its TCP connection
        self._silence_s = silence_s
        self._on_lost = on_lost

    def on_event(self, event: zmq.Event, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self.descriptor = value
            return  # the handshake is still to come
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected = True
        elif self.closed is None:
            self.closed = self._reason(event)
            if self.connected:
                self._on_lost(self, self.closed)
        self.settled.set()

    def _reason(self, event: zmq.Event) -> str:
        if self.connected:
            return f"its connection closed, or it was silent for {self._silence_s:g} s"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it does not allow this transport's key"
        if event in HANDSHAKE_FAILURES or event == zmq.EVENT_DISCONNECTED:
            return "it closed the connection during the handshake: it does not hold the expected key"
        return "nobody listens there"


#: Called in the guard's thread with a connection that was good, and why it is no more.
OnLost = Callable[[Connection, str], None]


class ZmqLink(Link):
    """A connected link. `encode` is Transport.encode of the transport that it belongs to."""

    def __init__(
        self,
        peer: Peer,
        socket: zmq.Socket[bytes],
        connection: Connection,
        hello: frame_pb2.LinkHello,
        encode: Callable[[Header, int, memoryview], bytes],
    ) -> None:
        super().__init__(peer)
        self._socket, self._connection, self._hello, self._encode = socket, connection, hello, encode
        self._window = SendWindow()
        self._look_at = FIRST_WINDOW_FRAMES // 4  # look for grants when that many frames were sent

    @property
    def epoch(self) -> int:
        return self._connection.epoch

    def confirm(self, epoch: int) -> None:
        self._connection.epoch = self._hello.epoch = epoch
        self._say_hello()

    @property
    def closed(self) -> str | None:
        return self._connection.closed

    @property
    def stats(self) -> LinkStats:
        window = self._window
        return LinkStats(
            frames=window.sent_frames,
            bytes=window.sent_bytes,
            queue_frames=window.frames_under_way,
            queue_bytes=window.sent_bytes - window.taken_bytes,
            round_trip_s=tcp_round_trip_s(self._connection.descriptor) if self._connection.closed is None else 0.0,
        )

    def send(self, header: Header, payload: Payload = b"", timeout: float | None = None) -> None:
        view = memoryview(payload)  # type: ignore[arg-type]  # arrays are buffers, which 3.11's types do not say
        window = self._window
        data = self._encode(header, window.sent_frames + 1, view)
        if window.sent_frames >= self._look_at or not window.open:
            self._read_grants()
        if self._connection.closed is None and window.open and self._try_send(data, view):
            return
        self._send_slowly(data, view, timeout)

    def start_closing(self) -> None:
        """Send nothing more, and ask the peer to say when it has taken everything."""
        if self.closed is None:
            self._hello.closing = True
            self._say_hello()

    def finish_closing(self) -> bool:
        """Whether there is nothing left to wait for."""
        if self.closed is None:
            self._read_grants()
        return self.closed is not None or not self._window.frames_under_way

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """For polling."""
        return self._socket

    def _say_hello(self) -> None:
        with suppress(zmq.Again):  # the connection has just gone
            self._socket.send(self._hello.SerializeToString(), zmq.NOBLOCK)

    def close(self) -> None:
        if not self._socket.closed:
            self._connection.closed = self._connection.closed or "it was closed by this end"
            self._socket.disable_monitor()
            self._socket.close()

    def _try_send(self, data: bytes, view: memoryview) -> bool:
        try:
            self._socket.send(data, _FIRST_PART)
        except zmq.Again:  # as many as this end may hold are waiting, or the connection has just gone
            return False
        self._socket.send(view)  # follows its first part without waiting
        self._window.sent(view.nbytes)
        return True

    def _send_slowly(self, data: bytes, view: memoryview, timeout: float | None) -> None:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            if self._connection.closed is not None:
                raise LinkClosed(f"the link to stage {self.peer.stage} is closed: {self._connection.closed}")
            if self._window.open and self._try_send(data, view):
                return
            wait_s = min(SLICE_S, deadline - time.monotonic())
            if wait_s <= 0:
                raise QueueFull(f"stage {self.peer.stage} took no frame in {timeout} s: {self.stats}")
            events = zmq.POLLIN | zmq.POLLOUT if self._window.open else zmq.POLLIN
            self._socket.poll(math.ceil(wait_s * 1000), events)
            self._read_grants()

    def _read_grants(self) -> None:
        """Take what the receiver said since the last look."""
        if self._socket.closed:
            return
        try:
            while True:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
                self._window_from(parts[0])
        except zmq.Again:
            self._look_at = self._window.sent_frames + max(1, self._window.window_frames // 4)

    def _window_from(self, data: bytes) -> None:
        try:
            grant = frame_pb2.LinkGrant.FromString(data)
        except DecodeError:
            return
        if grant.refused:
            self._connection.closed = f"it refused the link: {grant.refused[:1024]}"
        self._window.granted(grant)


def connect(
    context: ZmqContext,
    guard: Guard,
    options: TransportOptions,
    endpoint: str,
    peer: Peer,
    keys: ZmqKeys | None,
    timeout: float,
    on_lost: OnLost,
) -> tuple[zmq.Socket[bytes], Connection]:
    """A DEALER whose one connection has passed the handshake. Tries again until `timeout`; raises ConnectFailed."""
    deadline = time.monotonic() + timeout
    reason = "no answer"
    while (left_s := deadline - time.monotonic()) > 0:
        connection = Connection(options.silence_s, on_lost)
        socket = context.socket(zmq.DEALER)
        set_options(socket, options.silence_s)
        socket.sndhwm = high_water_mark(options.queue_frames)
        socket.maxmsgsize = MAX_GRANT_BYTES
        socket.reconnect_ivl = -1  # whoever listens there next is somebody else
        socket.immediate = True  # no frame is taken for a connection that does not exist
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = keys
            socket.curve_serverkey = peer.public_key.encode()
        guard.watch(socket, connection.on_event)
        socket.connect(endpoint)
        connection.settled.wait(left_s)
        if connection.connected and connection.closed is None:
            return socket, connection
        reason = connection.closed or reason
        socket.disable_monitor()
        socket.close()
        time.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
    raise ConnectFailed(f"stage {peer.stage} at {peer.address} was not reached in {timeout:g} s: {reason}")
