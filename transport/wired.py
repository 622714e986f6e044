"""What shm and ucx have in common: a door that opens links and sees them end, and a mailbox to which frames come."""

import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection

from google.protobuf.message import DecodeError

from eldric.transport.base import Link, Peer, Transport, TransportOptions, TransportStats
from eldric.transport.door import Door
from eldric.transport.errors import CorruptFrame, PeerLost, TransportClosed
from eldric.transport.filter import DropReason
from eldric.transport.frame import PROTOCOL_VERSION, Frame
from eldric.transport.hello import hello_problem
from eldric.transport.identity import Identity
from eldric.transport.mailbox import END, FRAME, HELLO, Arrival, Mailbox
from eldric.transport.opening import Wire
from eldric.transport.spin import Spinner
from eldric.transport.window import ReceiveWindow
from eldric.v1 import frame_pb2

logger = logging.getLogger(__name__)

#: A payload from here on is acknowledged as soon as it was taken, so that the sender's memory is soon free again.
_TELL_BYTES = 1024 * 1024


class WiredTransport(Transport):
    """Subclasses say how a link is made and what frames travel by."""

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None, mailbox: Mailbox) -> None:
        super().__init__(pipeline_id, stage, options)
        self._mailbox = mailbox
        self._identity = Identity() if self.options.encrypt else None
        self._allowed: frozenset[str] = frozenset()
        self._inbound: dict[Wire, ReceiveWindow] = {}
        self._opened: deque[Wire] = deque()  # by the door's threads
        self._ended: deque[Wire] = deque()  # by them too
        self._frames = self._bytes = 0
        self._woken = self._closed = False
        self._on_loss: Callable[[], None] | None = None
        self._spinner = Spinner(self.options.spin_s)
        self._door = Door(
            pipeline_id,
            self.options,
            self._identity,
            mailbox.address,
            lambda key: key in self._allowed,
            self._on_open,
            self._on_end,
        )

    @abstractmethod
    def _make_link(self, peer: Peer, hello: frame_pb2.LinkHello, timeout: float) -> Link:
        """Raises ConnectFailed, InvalidAddress."""

    def _finish(self, deadline: float) -> None:
        """Wait until the peers have taken what was sent, where the end of this transport would lose it."""

    @property
    def public_key(self) -> str:
        return "" if self._identity is None else self._identity.public_key.hex()

    def allow(self, keys: Collection[str]) -> None:
        self._allowed = frozenset(keys)

    def connect(self, peer: Peer, timeout: float = 5.0) -> Link:
        self._check_open()
        link = self._linked(peer)
        if link is None:
            hello = frame_pb2.LinkHello(
                protocol_version=PROTOCOL_VERSION, pipeline_id=self.pipeline_id, from_stage=self.stage, epoch=self.epoch
            )
            link = self._make_link(peer, hello, timeout)
            self._links.append(link)
        return link

    def recv(self, timeout: float | None = None) -> Frame | None:
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self.filter.released()
            if frame is None:
                if self._woken:
                    self._woken = False
                    return None
                if self._opened:
                    self._greet()
                arrival = self._wait(deadline)
                if arrival is not None:
                    frame = self._take(arrival)
                elif deadline is not None and not self._woken and time.monotonic() >= deadline:
                    return None
            if frame is not None:
                self._frames += 1
                self._bytes += frame.payload.nbytes
                return frame

    def wake(self) -> None:
        if not self._woken:  # else the bell that was rung then is still to be heard
            self._woken = True
            self._mailbox.ring()

    def settle(self, ask: bool = False) -> None:
        super().settle(ask)
        for wire, window in self._inbound.items():
            if not window.is_told:
                self._mailbox.tell(wire, window.grant())

    def on_loss(self, call: Callable[[], None]) -> bool:
        self._on_loss = call
        return True

    @property
    def stats(self) -> TransportStats:
        return TransportStats(
            frames=self._frames,
            bytes=self._bytes,
            peers=len(self._inbound),
            refused=self._door.refused,
            dropped=dict(self.filter.dropped),
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._finish(time.monotonic() + self.options.linger_s)
        for link in self._links:
            link.close()
        self._door.close()
        self._greet()
        for wire in self._inbound:
            self._mailbox.remove(wire)
        self._inbound.clear()
        self._mailbox.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"the transport of stage {self.stage} is closed")

    def _on_open(self, wire: Wire) -> None:
        """In a thread of the door's."""
        self._opened.append(wire)  # first, so that whatever comes by it comes from somebody who is known
        self._mailbox.expect(wire)
        self._mailbox.ring()

    def _on_end(self, wire: Wire) -> None:
        """In a thread of the door's."""
        self._ended.append(wire)
        self._mailbox.ring()
        if self._on_loss is not None:
            self._on_loss()

    def _wait(self, deadline: float | None) -> Arrival | None:
        """The next arrival. None at the deadline, and when the bell was rung. Raises PeerLost, once all was taken."""
        mailbox = self._mailbox
        if self._ended or self.losses:
            arrival = mailbox.take_last()
            if arrival is None:
                self._raise_lost()
            return arrival
        arrival = self._spinner.wait(mailbox.take, deadline)
        if arrival is None and not (self._woken or self._ended or self._opened or self.losses):
            mailbox.sleep(None if deadline is None else max(0.0, deadline - time.monotonic()))
            arrival = mailbox.take()
            self._spinner.slept()
        return arrival

    def _greet(self) -> None:
        while self._opened:
            wire = self._opened.popleft()
            try:
                self._mailbox.add(wire)
            except CorruptFrame as error:
                logger.warning("link refused pipeline=%s stage=%d: %s", self.pipeline_id, wire.stage, error)
                wire.hang_up(str(error))
                continue
            self._inbound[wire] = ReceiveWindow(self.options.queue_frames, self.options.queue_bytes)

    def _take(self, arrival: Arrival) -> Frame | None:
        """None when it is no frame for us, or not yet."""
        kind, wire, header, payload = arrival
        if self._opened:
            self._greet()
        window = self._inbound.get(wire)
        if window is None:  # it has been given up
            return None
        if kind != FRAME:
            self._take_other(kind, wire, header, window)
            return None
        frame = None
        if self._identity is not None and wire.key not in self._allowed:
            self.filter.drop(DropReason.UNKNOWN_PEER)
        else:
            frame = self.filter.admit(header, payload, wire)
        size = payload.nbytes
        if window.taken(size) or size >= _TELL_BYTES:
            self._mailbox.tell(wire, window.grant())
        return frame

    def _take_other(self, kind: int, wire: Wire, data: bytes, window: ReceiveWindow) -> None:
        if kind == END:
            wire.hang_up("its connection closed")
            self._ended.append(wire)
            return
        try:
            hello = frame_pb2.LinkHello.FromString(data)
        except DecodeError:
            hello = frame_pb2.LinkHello()
        fits = hello_problem(hello, self.pipeline_id) is None and hello.from_stage == wire.stage
        if kind == HELLO and fits:
            wire.epoch = hello.epoch
            self._mailbox.tell(wire, window.grant())
        else:
            self.filter.drop(DropReason.CORRUPT)

    def _raise_lost(self) -> None:
        """Report the next peer of this epoch that went away, if there is one."""
        while self._ended:
            wire = self._ended.popleft()
            if wire.inbound:
                if self._inbound.pop(wire, None) is None:
                    continue
                self._mailbox.remove(wire)
                if self._identity is not None and wire.key not in self._allowed:
                    continue
            reason = wire.closed or "its connection closed"
            self.losses.add(PeerLost(wire.stage, reason, inbound=wire.inbound, public_key=wire.key), wire)
        lost = self.losses.take()
        if lost is not None:
            raise lost
