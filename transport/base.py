"""What a transport is: the contract that zmq.py, inproc.py and third parties' transports keep.

A Transport belongs to one stage of one pipeline. It listens for the stages that send to it and makes links to those
that it sends to; in a ring that is one of each. Frames of one link arrive in order, each once or not at all.

Threads: `allow`, `wake` and `stats` may be called from any thread. All else is called by one thread at a time, the
stage's compute thread; other threads reach it by handing something over and calling `wake`.

Back-pressure: a link has a bounded number of frames and bytes under way, that is sent and not yet given out by the
peer's `recv`. At the bound `send` blocks, then raises QueueFull. A thread that is blocked in `send` receives nothing,
so a ring must have fewer steps under way than one link takes, or all stages may wait for each other.

Failing: a peer that closes, dies or falls silent is noticed without a call being made (at once when its connection
closes, after `silence_s` when it does not), and then raised once by `recv` as PeerLost. Its link is dead for good:
`send` raises LinkClosed, and nothing is sent again to whoever may listen there next. Frames under way are lost. The
pipeline goes on with a new epoch and new links.

Epochs: a stage enters one with `allow`, `set_epoch`, `connect`, in this order, whatever its neighbours have done so
far. Their frames of the new epoch wait for it. A link belongs to the epoch of the last `connect` that gave it; the end
of a link of an older epoch is not reported, so neighbours that leave the ring or change places disturb nobody.

Closing: Transport.close waits until the peers have taken what was sent, at most `linger_s`; they then see PeerLost.
Link.close waits for nothing: frames under way may be lost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Protocol, Self

from eldric.transport.codec import encode_header, stamp
from eldric.transport.errors import CorruptFrame
from eldric.transport.filter import FrameFilter
from eldric.transport.frame import MAX_PAYLOAD_BYTES, Frame, Header, Payload
from eldric.transport.losses import Losses


@dataclass(frozen=True, slots=True)
class Peer:
    """The receiving end of a link."""

    address: str  # what its `listen` returned, such as "zmq://10.0.0.7:41000"
    public_key: str  # what its `public_key` is: whoever listens there with another one is not spoken to
    stage: int  # index of its stage, for errors and events


class Relay(Protocol):
    """A node's way through an edge, for nodes that nobody can connect to. Called by any thread but the control loop's;
    addresses are "host:port". `expose` and `reach` may block, and raise any error."""

    def expose(self, host: str, port: int) -> str:
        """The address by which others reach a port of this node, until `withdraw`."""

    def withdraw(self, address: str) -> None:
        """Others need this address no longer. Never blocks."""

    def reach(self, address: str) -> str:
        """An address of this machine that leads to another one."""


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Settings of one transport."""

    queue_frames: int = 64  # frames that may be under way from each peer that sends to us
    queue_bytes: int = 256 * 1024 * 1024  # and their payloads in bytes; one frame more may start below the bound
    max_payload_bytes: int = MAX_PAYLOAD_BYTES  # larger frames are neither sent nor let in
    silence_s: float = 3.0  # a peer that is not heard of for longer is lost; must exceed the time of one frame's way
    relay_silence_s: float = 10.0  # the same where a network may come back: for a relay, longer than a tunnel takes
    linger_s: float = 1.0  # how long Transport.close waits for peers to take what was sent
    encrypt: bool = True  # False: no encryption, and anybody who reaches the port may send
    relay: Relay | None = None  # for "relay": this node's tunnel; None: it is reached, and reaches others, directly
    spin_s: float = 0.0002  # recv looks for a frame that long before it sleeps, while frames usually come that soon


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Counters of a link since its beginning."""

    frames: int
    bytes: int  # of payloads
    queue_frames: int  # under way; the peer tells what it took only now and then, so up to a quarter of its queue more
    queue_bytes: int
    round_trip_s: float = 0.0  # to the peer and back, the median of the last ones; 0: not known


@dataclass(frozen=True, slots=True)
class TransportStats:
    """Counters of the receiving side since its beginning."""

    frames: int = 0  # given out by recv
    bytes: int = 0  # of their payloads
    peers: int = 0  # that are connected to us now and said hello
    refused: int = 0  # connections refused: no key, a key that is not allowed, another pipeline or protocol version
    dropped: Mapping[str, int] = field(default_factory=dict)  # frames not let in, by filter.DropReason


class Link(ABC):
    """One way to one peer. Made by Transport.connect; used by the transport's thread."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch that it belongs to."""

    @abstractmethod
    def confirm(self, epoch: int) -> None:
        """Go on in a new epoch, and let the peer know. Called by Transport.connect."""

    @abstractmethod
    def send(self, header: Header, payload: Payload = b"", timeout: float | None = None) -> None:
        """Send one frame. The payload is copied or gone when this returns, so its memory may be used again.

        The link fills in pipeline, epoch, sender and serial. timeout: seconds to wait for room (None: no bound).
        Raises QueueFull (nothing was sent), LinkClosed, and CorruptFrame for a frame that the peer would drop.
        """

    def refresh(self, ask: bool) -> None:
        """Take in what the peer said since the last frame was sent, for `stats`. ask: measure the round trip, too."""
        return

    @property
    @abstractmethod
    def closed(self) -> str | None:
        """Why nothing can be sent any more; None while the link is good. May be read from any thread."""

    @property
    @abstractmethod
    def stats(self) -> LinkStats:
        """Counters. May be read from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the peer at once; frames under way may be lost. Idempotent."""


class Transport(ABC):
    """One stage's end of the data plane.

    A class registered under the entry-point group `eldric.transports` is called as `cls(pipeline_id, stage, options)`.
    """

    scheme: ClassVar[str]  # of its addresses, "zmq" for "zmq://10.0.0.7:41000"

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        self.pipeline_id, self.stage = pipeline_id, stage
        self.options = options or TransportOptions()
        self.filter = FrameFilter(
            pipeline_id,
            max_payload_bytes=self.options.max_payload_bytes,
            early_frames=self.options.queue_frames,
            early_bytes=self.options.queue_bytes,
        )
        self.losses = Losses()
        self._links: list[Link] = []
        self._stamped = b""

    def _linked(self, peer: Peer) -> Link | None:
        """The good link to that very peer, confirmed for this epoch. For `connect`."""
        self._links = [link for link in self._links if link.closed is None]
        for link in self._links:
            if link.peer == peer:
                link.confirm(self.epoch)
                return link
        return None

    def encode(self, header: Header, serial: int, payload: memoryview) -> bytes:
        """A header to send with `payload`, complete with this sender's fields. For links.

        Raises CorruptFrame, also before the first `set_epoch`.
        """
        if not self._stamped:
            raise CorruptFrame("no epoch is set")
        if payload.nbytes > self.options.max_payload_bytes or not payload.c_contiguous:
            limit = self.options.max_payload_bytes
            raise CorruptFrame(f"payload of {payload.nbytes} bytes is over {limit}, or not one piece of memory")
        return encode_header(header, self._stamped, serial, payload.nbytes)

    @property
    def epoch(self) -> int:
        """The epoch that frames are sent with and let in from. 0: none yet."""
        return self.filter.epoch

    @property
    @abstractmethod
    def public_key(self) -> str:
        """Who this transport is to its peers; the private half never leaves it. Empty without encryption."""

    @property
    def encryption(self) -> str:
        """What protects frames on their way: "curve", "tls", "host" (they do not leave the machine), or "none"."""
        return "none"

    @abstractmethod
    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Take connections on an address of this machine; port 0 picks a free one. Returns the address for peers.

        A wildcard host ("0.0.0.0", "::") stays in the returned address: whoever publishes it puts a reachable one in.
        Raises ListenFailed.
        """

    @abstractmethod
    def allow(self, keys: Collection[str]) -> None:
        """Let only holders of these keys in, from now on; nobody before the first call. May be called from any thread.

        Frames of a peer whose key is not among them any more are dropped, and its end is not reported.
        """

    def set_epoch(self, epoch: int) -> None:
        """Send with this epoch and let only its frames in, those included that came early.

        Links stay open for `connect` to give them again; those that it did not give in the epoch before are closed.
        """
        self._stamped = stamp(self.pipeline_id, epoch, self.stage)
        for link in self._links:
            if link.epoch < self.epoch:
                link.close()
        self.filter.set_epoch(epoch)
        self.losses.set_epoch(epoch)

    @abstractmethod
    def connect(self, peer: Peer, timeout: float = 5.0) -> Link:
        """A link to `peer`: the one that there is, if it is good, else a new one.

        Tries again until the timeout, as the peer may not listen or not allow this key yet. Returns once the peer has
        proven its key and accepted ours. The peer's thread need not be receiving.
        Raises ConnectFailed with the last try's reason.
        """

    @abstractmethod
    def recv(self, timeout: float | None = None) -> Frame | None:
        """The next frame; None after `wake` or after timeout seconds (None: no bound, 0: do not wait).

        Raises PeerLost once for each lost peer, and TransportClosed.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make the current `recv`, or else the next one, return None. Any thread; never blocks; wakes may merge."""

    def settle(self, ask: bool = False) -> None:
        """Bring the counters of links up to date at both their ends. For a time when there is nothing else to do.

        ask: measure their round trips, where it takes asking the peer, who should be waiting in its recv.
        """
        for link in self._links:
            if link.closed is None:
                link.refresh(ask)

    def on_loss(self, call: Callable[[], None]) -> bool:
        """Call this, which never blocks, in any thread as soon as `recv` has a lost peer to report.

        For stages that wait in another transport's recv. False where nothing is noticed but in `recv` itself, so that
        it must be called now and then.
        """
        return False

    @property
    @abstractmethod
    def stats(self) -> TransportStats:
        """Counters. May be read from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Close all links once what was sent was taken, give every port and thread back. At most linger_s. Idempotent.

        Frames that come meanwhile are dropped.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
