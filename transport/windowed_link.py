"""What links have in common whose receiver tells now and then how much it has taken."""

import math
import statistics
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable

from google.protobuf.message import DecodeError

from eldric.transport.base import Link, LinkStats, Peer
from eldric.transport.errors import LinkClosed, QueueFull
from eldric.transport.frame import Header, Payload
from eldric.transport.window import FIRST_WINDOW_FRAMES, SendWindow
from eldric.v1 import frame_pb2

_ASK_S = 0.005  # longest round trip that a link measures by itself: its thread does nothing else meanwhile
_REMEMBERED = 16  # round trips that the median looks back on
SLICE_S = 0.02  # a sender that waits for room looks this often whether its peer was lost

#: Transport.encode of the transport that a link belongs to.
Encode = Callable[[Header, int, memoryview], bytes]


class WindowedLink(Link):
    """Sends while the window is open; subclasses know how."""

    def __init__(self, peer: Peer, encode: Encode) -> None:
        super().__init__(peer)
        self._encode = encode
        self._window = SendWindow()
        self._heard = 0  # what the receiver said
        self._asked: deque[float] = deque(maxlen=_REMEMBERED)  # round trips
        self._look_at = FIRST_WINDOW_FRAMES // 4  # look for grants when that many frames were sent

    @abstractmethod
    def _try_send(self, data: bytes, view: memoryview) -> bool:
        """Send a header and a payload if that takes no waiting, and count them in the window."""

    @abstractmethod
    def _take_grants(self) -> None:
        """Give what the receiver said since the last look to `_granted`."""

    @abstractmethod
    def _wait_for_room(self, wait_s: float) -> None:
        """Until the receiver said something, or the peer may be sent to again; at most wait_s."""

    @abstractmethod
    def _refused(self, reason: str) -> None:
        """The receiver does not want this link."""

    @property
    def stats(self) -> LinkStats:
        window = self._window
        return LinkStats(
            frames=window.sent_frames,
            bytes=window.sent_bytes,
            queue_frames=window.frames_under_way,
            queue_bytes=window.sent_bytes - window.taken_bytes,
            round_trip_s=self.round_trip_s,
        )

    @property
    def round_trip_s(self) -> float:
        """To the peer and back, in seconds; 0 where it is not known. May be read from any thread."""
        asked = tuple(self._asked)
        return statistics.median(asked) if asked else 0.0

    @property
    def asks_s(self) -> float:
        """How long to wait for an answer when the round trip is measured, in seconds."""
        return _ASK_S

    def send(self, header: Header, payload: Payload = b"", timeout: float | None = None) -> None:
        view = memoryview(payload)  # type: ignore[arg-type]  # arrays are buffers, which 3.11's types do not say
        window = self._window
        data = self._encode(header, window.sent_frames + 1, view)
        if window.sent_frames >= self._look_at:
            self._read_grants()
        if self.closed is None and window.open and self._try_send(data, view):
            return
        self._send_slowly(data, view, timeout)

    def refresh(self, ask: bool) -> None:
        self._read_grants()
        if ask:
            self._ask()

    def _send_slowly(self, data: bytes, view: memoryview, timeout: float | None) -> None:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            if self.closed is not None:
                raise LinkClosed(f"the link to stage {self.peer.stage} is closed: {self.closed}")
            self._read_grants()
            if self._window.open and self._try_send(data, view):
                return
            wait_s = min(SLICE_S, deadline - time.monotonic())
            if wait_s <= 0:
                raise QueueFull(f"stage {self.peer.stage} took no frame in {timeout} s: {self.stats}")
            self._wait_for_room(wait_s)

    def _ask(self) -> None:
        """Measure the round trip: say hello again, which a peer that has nothing to do answers at once."""
        heard, began = self._heard, time.perf_counter()
        self.confirm(self.epoch)
        while self._heard == heard:
            left_s = began + self.asks_s - time.perf_counter()
            if left_s <= 0 or self.closed is not None:
                return
            self._wait_for_room(left_s)
            self._take_grants()
        self._asked.append(time.perf_counter() - began)

    def _read_grants(self) -> None:
        self._take_grants()
        self._look_at = self._window.sent_frames + max(1, self._window.window_frames // 4)

    def _granted(self, data: bytes) -> None:
        """A serialized LinkGrant has come, or something that a peer made up."""
        self._heard += 1
        try:
            grant = frame_pb2.LinkGrant.FromString(data)
        except DecodeError:
            return
        if grant.refused:
            self._refused(f"it refused the link: {grant.refused[:1024]}")
        self._window.granted(grant)
