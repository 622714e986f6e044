"""The thread beside a transport whose links have a connection of their own: it opens them, and sees them end.

Both ends of a connection send a byte now and then. A connection that closes or falls silent is a lost peer.
"""

import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from eldric.transport.base import Peer, TransportOptions
from eldric.transport.bell import Bell
from eldric.transport.errors import ConnectFailed
from eldric.transport.hello import hello_problem
from eldric.transport.identity import Identity
from eldric.transport.opening import NOT_ALLOWED, Conversation, Wire, open_inbound, open_outbound
from eldric.v1 import frame_pb2

logger = logging.getLogger(__name__)

RETRY_S = 0.05  # between two tries to connect
REST_S = 1.0  # until connections are taken again, when there were no open files or threads left for one
MAX_OPENING = 16  # connections that open at a time; more are closed at once
_BACKLOG = 64
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

#: Called with a wire that has opened or has ended, in a thread of the door's.
OnWire = Callable[[Wire], None]


class Door:
    """`is_allowed`, `on_open` (inbound wires; frames may have come by then) and `on_end` are called in its threads."""

    def __init__(
        self,
        pipeline_id: str,
        options: TransportOptions,
        identity: Identity | None,
        address: bytes,
        is_allowed: Callable[[str], bool],
        on_open: OnWire,
        on_end: OnWire,
    ) -> None:
        """address: where peers reach this transport by other means; empty when there are none."""
        self._pipeline_id, self._options, self._identity, self._address = pipeline_id, options, identity, address
        self._is_allowed, self._on_open, self._on_end = is_allowed, on_open, on_end
        self.refused = 0
        self._listeners: dict[int, socket.socket] = {}
        self._wires: dict[int, Wire] = {}
        self._new: SimpleQueue[socket.socket | Wire] = SimpleQueue()
        self._opening: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()  # of _opening and refused
        self._beaten = 0.0
        self._rest_until = 0.0  # no connection is taken before; 0: they are
        self._stop = False
        self._bell = Bell()
        self._poller = select.poll()
        self._poller.register(self._bell, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="eldric-transport-door", daemon=True)
        self._thread.start()

    def listen(self, listener: socket.socket) -> None:
        """Take connections of a bound stream socket, which becomes the door's."""
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._hand_over(listener)

    def connect(
        self,
        dial: Callable[[float], socket.socket],
        peer: Peer,
        hello: frame_pb2.LinkHello,
        timeout: float,
        *,
        descriptors: Sequence[int] = (),
        address: bytes = b"",
    ) -> tuple[Wire, frame_pb2.LinkGrant]:
        """An outbound wire, and the receiver's first grant. dial(timeout_s): a socket that is connected to the peer.
        descriptors, address: what the peer gets with it: open files, and where this end is to be reached.

        Tries again until the timeout. Raises ConnectFailed. A wire that the receiver refused is `closed`.
        """
        deadline = time.monotonic() + timeout
        reason = "no answer"
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                sock = dial(left_s)
                try:
                    return self._open(Conversation(sock, deadline), peer, hello, descriptors, address)
                except BaseException:
                    sock.close()
                    raise
            except ConnectFailed as error:
                reason = str(error)
            except ConnectionRefusedError:
                reason = "nobody listens there"
            except OSError as error:
                reason = str(error) or "no answer"
            time.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
        raise ConnectFailed(f"stage {peer.stage} at {peer.address} was not reached in {timeout:g} s: {reason}")

    def close(self) -> None:
        """Hang up every wire, take no more connections, end the threads."""
        self._stop = True
        self._bell.ring()
        self._thread.join()
        with self._lock:
            opening = tuple(self._opening.items())
        for sock, thread in opening:
            with suppress(OSError):  # it has just opened, or failed
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._take_over()
        for wire in self._wires.values():
            wire.closed = wire.closed or "it was closed by this end"
            wire.socket.close()
        for listener in self._listeners.values():
            listener.close()
        self._bell.close()

    def _open(
        self,
        talk: Conversation,
        peer: Peer,
        hello: frame_pb2.LinkHello,
        descriptors: Sequence[int],
        address: bytes,
    ) -> tuple[Wire, frame_pb2.LinkGrant]:
        accepted, grant = open_outbound(talk, hello, self._identity, peer.public_key, address, descriptors)
        wire = Wire(
            stage=peer.stage,
            epoch=hello.epoch,
            socket=talk.socket,
            inbound=False,
            key=peer.public_key,
            address=accepted.address,
        )
        if grant.refused:
            wire.closed = f"it refused the link: {grant.refused[:1024]}"
        self._keep(wire)
        return wire, grant

    def _keep(self, wire: Wire) -> None:
        wire.heard = time.monotonic()
        wire.socket.setblocking(False)
        self._hand_over(wire)

    def _hand_over(self, new: socket.socket | Wire) -> None:
        self._new.put(new)
        self._bell.ring()

    def _run(self) -> None:
        silence_s = self._options.silence_s
        while not self._stop:
            for descriptor, _ in self._poller.poll(self._patience_ms(silence_s)):
                if descriptor == self._bell.fileno():
                    self._bell.hear()
                    self._take_over()
                elif descriptor in self._listeners:
                    self._accept(self._listeners[descriptor])
                elif descriptor in self._wires:
                    self._hear(self._wires[descriptor])
            now = time.monotonic()
            self._beat(now, silence_s)
            if self._rest_until and now >= self._rest_until:
                self._listen_again()

    def _patience_ms(self, silence_s: float) -> float | None:
        waits = [silence_s / 6] if self._wires else []
        if self._rest_until:
            waits.append(max(0.0, self._rest_until - time.monotonic()))
        return min(waits) * 1000 if waits else None

    def _take_over(self) -> None:
        while not self._new.empty():
            new = self._new.get()
            if isinstance(new, Wire):
                self._wires[new.socket.fileno()] = new
                self._poller.register(new.socket, select.POLLIN)
            else:
                self._listeners[new.fileno()] = new
                if not self._rest_until:
                    self._poller.register(new, select.POLLIN)

    def _hear(self, wire: Wire) -> None:
        try:
            beats = wire.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            beats = b""
        if beats:
            wire.heard = time.monotonic()
        else:
            self._end(wire)

    def _beat(self, now: float, silence_s: float) -> None:
        """Give a sign to every peer, and give up those that gave none. Beats come twice in the time that is allowed."""
        due = now - self._beaten >= silence_s / 3
        if due:
            self._beaten = now
        for wire in tuple(self._wires.values()):
            if now - wire.heard > silence_s * 5 / 6:
                self._end(wire)
            elif due:
                with suppress(OSError):  # a peer that reads nothing is silent too; one that has closed is seen next
                    wire.socket.send(b"\0")

    def _end(self, wire: Wire) -> None:
        descriptor = wire.socket.fileno()
        self._poller.unregister(descriptor)
        del self._wires[descriptor]
        wire.socket.close()
        if wire.closed is None:
            wire.closed = f"its connection closed, or it was silent for {self._options.silence_s:g} s"
            self._on_end(wire)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._rest(str(error))
            return
        thread = threading.Thread(target=self._admit, args=(sock,), name="eldric-transport-opening", daemon=True)
        with self._lock:
            if len(self._opening) >= MAX_OPENING:
                sock.close()
                return
            self._opening[sock] = thread
            try:
                thread.start()
            except RuntimeError as error:  # as many as the process may have
                del self._opening[sock]
                sock.close()
                self._rest(str(error))

    def _rest(self, reason: str) -> None:
        """Take no connections for a moment: a listener that cannot take one would be looked at again and again."""
        if self._rest_until:
            return
        logger.error("connections wait pipeline=%s: %s", self._pipeline_id, reason)
        for listener in self._listeners.values():
            self._poller.unregister(listener)
        self._rest_until = time.monotonic() + REST_S

    def _listen_again(self) -> None:
        self._rest_until = 0.0
        for listener in self._listeners.values():
            self._poller.register(listener, select.POLLIN)

    def _admit(self, sock: socket.socket) -> None:
        """In a thread of its own, because a peer may take its time. It has `silence_s`."""
        talk = Conversation(sock, time.monotonic() + self._options.silence_s)
        wire = None
        try:
            wire = self._greet(talk)
        except (ConnectFailed, OSError) as error:
            logger.info("connection refused pipeline=%s: %s", self._pipeline_id, error)
        if wire is None:
            talk.drop_descriptors()
            sock.close()
        else:
            self._on_open(wire)
            self._keep(wire)
        with self._lock:
            del self._opening[sock]
            self.refused += wire is None

    def _greet(self, talk: Conversation) -> Wire | None:
        opening = open_inbound(talk, self._identity, self._address)
        key = "" if opening is None or self._identity is None else opening.public_key.hex()
        if opening is None or (self._identity is not None and not self._is_allowed(key)):
            talk.say(frame_pb2.LinkGrant(refused=NOT_ALLOWED))
            return None
        problem = hello_problem(opening.hello, self._pipeline_id)
        if problem is not None:
            logger.warning("link refused pipeline=%s: %s", self._pipeline_id, problem)
            talk.say(frame_pb2.LinkGrant(refused=problem))
            return None
        talk.say(frame_pb2.LinkGrant(window_frames=self._options.queue_frames, window_bytes=self._options.queue_bytes))
        return Wire(
            stage=opening.hello.from_stage,
            epoch=opening.hello.epoch,
            socket=talk.socket,
            inbound=True,
            key=key,
            address=opening.address,
            descriptors=talk.descriptors,
        )
