"""The sending end of a ZeroMQ link: one DEALER, one connection, never made again by itself."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from eldric.transport.base import Peer, TransportOptions
from eldric.transport.errors import ConnectFailed
from eldric.transport.round_trip import tcp_round_trip_s
from eldric.transport.windowed_link import Encode, WindowedLink
from eldric.transport.zmq_guard import HANDSHAKE_FAILURES, Guard, ZmqContext, ZmqKeys, high_water_mark, set_options
from eldric.v1 import frame_pb2

MAX_GRANT_BYTES = 4096
_FIRST_PART = int(zmq.NOBLOCK | zmq.SNDMORE)  # put together once: each `|` of flags takes half a microsecond
_ASK_S = 0.1  # longest round trip that is measured by asking, where the kernel does not know: through an edge
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


class ZmqLink(WindowedLink):
    """A connected link. `encode` is Transport.encode of the transport that it belongs to."""

    def __init__(
        self,
        peer: Peer,
        socket: zmq.Socket[bytes],
        connection: Connection,
        hello: frame_pb2.LinkHello,
        encode: Encode,
    ) -> None:
        super().__init__(peer, encode)
        self._socket, self._connection, self._hello = socket, connection, hello

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
    def round_trip_s(self) -> float:
        """By asking; of a peer that is too far away for that, by what the kernel knows."""
        asked = super().round_trip_s
        return asked or (tcp_round_trip_s(self._connection.descriptor) if self._connection.closed is None else 0.0)

    @property
    def asks_s(self) -> float:
        return super().asks_s if self._connection.descriptor >= 0 else _ASK_S

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

    def _wait_for_room(self, wait_s: float) -> None:
        events = zmq.POLLIN | zmq.POLLOUT if self._window.open else zmq.POLLIN
        self._socket.poll(math.ceil(wait_s * 1000), events)

    def _take_grants(self) -> None:
        if self._socket.closed:
            return
        with suppress(zmq.Again):
            while True:
                self._granted(self._socket.recv_multipart(zmq.NOBLOCK)[0])

    def _refused(self, reason: str) -> None:
        self._connection.closed = reason


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
