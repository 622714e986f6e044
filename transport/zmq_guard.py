"""The thread beside a ZeroMQ transport: it decides who may connect (ZAP), and sees connections come and go (monitors).

One guard, one zmq.Context and one transport belong together, because there is one ZAP handler in a context.
ZAP: https://rfc.zeromq.org/spec/27/. Monitor events: http://api.zeromq.org/4-3:zmq-socket-monitor.
"""

import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from queue import SimpleQueue

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from eldric.transport.window import FIRST_WINDOW_FRAMES

logger = logging.getLogger(__name__)

ZmqContext = zmq.Context[zmq.Socket[bytes]]
ZmqKeys = tuple[bytes, bytes]  # public, secret; Z85

WATCHED_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_MONITOR_STOPPED
)
HANDSHAKE_FAILURES = frozenset(
    (
        zmq.EVENT_HANDSHAKE_FAILED_AUTH,
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    )
)


def set_options(socket: zmq.Socket[bytes], silence_s: float) -> None:
    """What both ends have in common. Heartbeats: a lost peer is noticed within silence_s."""
    silence_ms = math.ceil(silence_s * 1000)
    socket.linger = 0  # Transport.close waits by itself
    socket.ipv6 = True
    socket.handshake_ivl = silence_ms
    socket.heartbeat_ivl = max(1, silence_ms // 3)
    socket.heartbeat_timeout = max(1, silence_ms * 2 // 3)


def high_water_mark(queue_frames: int) -> int:
    """ZeroMQ's own bound for a queue of that many frames: one that honest peers never meet.

    A pipe learns only in steps of half its mark that messages were read, so it may hold half of it when it says no.
    """
    return 2 * (max(queue_frames, FIRST_WINDOW_FRAMES) + 2)


#: Called in the guard's thread with an event and its value (ACCEPTED, CONNECTED, DISCONNECTED: the file descriptor).
OnEvent = Callable[[zmq.Event, int], None]


class Doorbell:
    """Wakes a thread that waits in a socket's recv. `ring` may be called from any thread and never blocks."""

    def __init__(self, context: ZmqContext, kind: int, endpoint: str, identity: bytes) -> None:
        self._lock = threading.Lock()
        self._socket = context.socket(kind)
        self._socket.linger = 0
        if identity:
            self._socket.routing_id = identity
        self._socket.connect(endpoint)

    def ring(self) -> None:
        with self._lock:
            if not self._socket.closed:
                with suppress(zmq.Again):  # it rings already
                    self._socket.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        with self._lock:
            self._socket.close()


class Guard:
    """Answers ZAP requests with `allowed`, and tells watchers what happens to their sockets' connections."""

    def __init__(self, context: ZmqContext, allowed: Callable[[str], bool]) -> None:
        self._context = context
        self._allowed = allowed
        self._new: SimpleQueue[tuple[zmq.Socket[bytes], OnEvent]] = SimpleQueue()
        self._waiting: SimpleQueue[threading.Event] = SimpleQueue()
        self._names = count()
        self._stop = False
        self._zap = context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._calls = context.socket(zmq.PULL)
        self._calls.bind("inproc://guard")
        self._doorbell = Doorbell(context, zmq.PUSH, "inproc://guard", b"")
        self._watched: dict[zmq.Socket[bytes], OnEvent] = {}
        self._thread = threading.Thread(target=self._run, name="eldric-transport-guard", daemon=True)
        self._thread.start()

    def watch(self, socket: zmq.Socket[bytes], on_event: OnEvent) -> None:
        """Report the socket's connections until it is closed. Called by the socket's thread, before it connects."""
        endpoint = f"inproc://monitor-{next(self._names)}"
        socket.monitor(endpoint, WATCHED_EVENTS)
        monitor = self._context.socket(zmq.PAIR)
        monitor.connect(endpoint)  # here, because an event without a reader would be lost
        self._new.put((monitor, on_event))
        self._doorbell.ring()

    def catch_up(self) -> None:
        """Return once every event that happened before this call was given to its watcher."""
        done = threading.Event()
        self._waiting.put(done)
        self._doorbell.ring()
        while not done.wait(1) and self._thread.is_alive():
            pass

    def stop(self) -> None:
        """End the thread; sockets that are still watched are watched no more."""
        self._stop = True
        self._doorbell.ring()
        self._thread.join()
        self._doorbell.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._calls, zmq.POLLIN)
        while not self._stop:
            for socket, _ in poller.poll():
                if socket is self._zap:
                    self._answer()
                elif socket is self._calls:
                    self._calls.recv()
                    self._serve_calls(poller)
                elif socket in self._watched:
                    self._report(socket, poller)
        self._serve_calls(poller)
        for socket in (self._zap, self._calls, *self._watched):
            socket.close(linger=0)

    def _serve_calls(self, poller: zmq.Poller) -> None:
        while not self._new.empty():
            monitor, on_event = self._new.get()
            self._watched[monitor] = on_event
            poller.register(monitor, zmq.POLLIN)
        while not self._waiting.empty():
            done = self._waiting.get()
            for monitor in tuple(self._watched):
                while self._report(monitor, poller):
                    pass
            done.set()

    def _report(self, monitor: zmq.Socket[bytes], poller: zmq.Poller) -> bool:
        """Give the monitor's next event to its watcher. False when there is none, or never will be."""
        try:
            message = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return False
        event = zmq.Event(message["event"])
        if event == zmq.EVENT_MONITOR_STOPPED:
            poller.unregister(monitor)
            del self._watched[monitor]
            monitor.close(linger=0)
            return False
        try:
            self._watched[monitor](event, message["value"])
        except Exception:  # a guard that dies would let every later loss go unseen
            logger.exception("watcher failed event=%s", event.name)
        return True

    def _answer(self) -> None:
        request = self._zap.recv_multipart()
        version, request_id, mechanism = request[0], request[1], request[5]
        key = ""
        if mechanism == b"CURVE" and len(request) == 7 and len(request[6]) == 32:
            key = z85.encode(request[6]).decode()
        if key and self._allowed(key):
            self._zap.send_multipart([version, request_id, b"200", b"OK", key.encode(), b""])
        else:
            self._zap.send_multipart([version, request_id, b"400", b"this key is not allowed here", b"", b""])
