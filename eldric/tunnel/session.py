"""A session's channels and ports as one end of the tunnel sees them: a state machine without socket or clock.

What this end does becomes messages, which `next` gives to be sent; a message that came becomes an event. A channel ends
when both sides have ended it. Whatever the other side does, what is held stays within TunnelLimits, or it is a
TunnelViolation.
"""

from dataclasses import dataclass

from eldric.errors import QueueIsFull
from eldric.tunnel.ledger import Ledger
from eldric.tunnel.limits import MAX_TEXT, PIECE_BYTES, WINDOW_BYTES, TunnelLimits, TunnelViolation
from eldric.v1 import tunnel_pb2

#: Bytes that wait for the stream, beyond which channels wait for their turn: one with a lot to send does not hold up
#: the others. Those with little to send, such as beats and the steps of a token, need no turn.
BACKLOG_BYTES = 256 * 1024
SMALL_BYTES = 16 * 1024
#: Credit is given in steps of this: a quarter of a window.
_CREDIT_BYTES = WINDOW_BYTES // 4


@dataclass(frozen=True, slots=True)
class Opened:
    """The other side opened a channel: to our port of this number, or to an address."""

    channel: int
    port_id: int
    address: str


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes for the channel's connection. Tell `passed_on` when it took them."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Credited:
    """More may be sent in this channel."""

    channel: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The other side sends no more in this channel. `abort`: the channel is over."""

    channel: int
    abort: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Expose:
    """The node asks for a port."""

    port_id: int
    wish: int


@dataclass(frozen=True, slots=True)
class Exposed:
    """The edge's answer: an address, or why there is none."""

    port_id: int
    address: str
    refused: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The node gives a port back."""

    port_id: int


@dataclass(frozen=True, slots=True)
class Left:
    """The node is done: the session is over."""


Event = Opened | Data | Credited | Ended | Expose | Exposed | Withdraw | Left


@dataclass(slots=True)
class _Channel:
    credit: int = WINDOW_BYTES  # bytes that may be sent
    allowance: int = WINDOW_BYTES  # bytes that may come
    held: int = 0  # bytes that came and did not go on yet
    passed_on: int = 0  # bytes that went on, for which no credit was given yet
    ended: bool = False
    aborted: bool = False
    peer_ended: bool = False


class Session:
    """One end. `is_node`: the node's, whose channels have odd numbers; else the edge's."""

    def __init__(self, *, is_node: bool, limits: TunnelLimits | None = None) -> None:
        self.limits = limits or TunnelLimits()
        self.ledger = Ledger()
        #: Channels that the other side opened or filled beyond the limits.
        self.refused = 0
        self._held = 0
        self._is_node = is_node
        self._last_own = -1 if is_node else 0
        self._last_peer = 0 if is_node else -1
        self._channels: dict[int, _Channel] = {}

    @property
    def channels(self) -> int:
        """How many are open."""
        return len(self._channels)

    @property
    def is_full(self) -> bool:
        """Whether so much waits for acknowledgement that channels must not send."""
        return self.ledger.kept_bytes >= self.limits.kept_bytes

    @property
    def is_busy(self) -> bool:
        """Whether channels must wait until the stream has taken more, or the other side acknowledged some."""
        return self.is_full or self.ledger.unsent_bytes >= BACKLOG_BYTES

    def next(self) -> tunnel_pb2.TunnelMessage | None:
        """The next message to be sent, if there is one."""
        return self.ledger.next()

    def pulse(self) -> tunnel_pb2.TunnelMessage:
        """What is sent when there is nothing else."""
        return tunnel_pb2.TunnelMessage(received=self.ledger.received)

    # What this end does.

    def open(self, *, port_id: int = 0, address: str = "") -> int:
        """A new channel's number. Raises QueueIsFull when there are as many as may be."""
        if len(self._channels) >= self.limits.channels:
            raise QueueIsFull(f"the tunnel has {len(self._channels)} channels, no more are let in")
        self._last_own += 2
        self._channels[self._last_own] = _Channel()
        opened = tunnel_pb2.OpenChannel(channel=self._last_own)
        if address:
            opened.address = address
        else:
            opened.port_id = port_id
        self._add(open=opened)
        return self._last_own

    def send(self, channel: int, data: memoryview) -> int:
        """How many of these bytes are sent; 0 until there is credit, and while the session is busy."""
        state = self._channels.get(channel)
        if state is None or state.ended:
            return 0
        taken, is_small = 0, len(data) <= SMALL_BYTES
        while (count := min(len(data) - taken, state.credit, PIECE_BYTES)) > 0:
            if self.is_full if is_small else self.is_busy:
                break
            self._add(data=tunnel_pb2.ChannelData(channel=channel, data=bytes(data[taken : taken + count])))
            state.credit -= count
            taken += count
        return taken

    def passed_on(self, channel: int, count: int) -> None:
        """The channel's connection took so many bytes that came."""
        state = self._channels.get(channel)
        if state is None or state.aborted:
            return
        state.held -= count
        self._held -= count
        state.passed_on += count
        if state.passed_on >= _CREDIT_BYTES and not state.peer_ended:
            state.allowance += state.passed_on
            self._add(credit=tunnel_pb2.ChannelCredit(channel=channel, bytes=state.passed_on))
            state.passed_on = 0

    def end(self, channel: int, reason: str = "", *, abort: bool = False) -> None:
        """Send no more; with `abort`, take no more either. Nothing happens in a channel that is over."""
        state = self._channels.get(channel)
        if state is None or state.aborted or (state.ended and not abort):
            return
        state.ended, state.aborted = True, abort
        self._add(end=tunnel_pb2.ChannelEnd(channel=channel, abort=abort, reason=reason[:MAX_TEXT]))
        if abort:
            self._let_go(state)
        if state.peer_ended:
            self._forget(channel)

    def expose(self, port_id: int, wish: int = 0) -> None:
        self._add(expose=tunnel_pb2.ExposePort(port_id=port_id, wish=wish))

    def exposed(self, port_id: int, address: str, refused: str = "") -> None:
        self._add(exposed=tunnel_pb2.PortExposed(port_id=port_id, address=address, refused=refused[:MAX_TEXT]))

    def withdraw(self, port_id: int) -> None:
        self._add(withdraw=tunnel_pb2.WithdrawPort(port_id=port_id))

    def leave(self) -> None:
        self._add(leave=tunnel_pb2.TunnelLeave())

    # What the other side does.

    def receive(self, message: tunnel_pb2.TunnelMessage) -> Event | None:
        """What a message means; None for nothing. Raises TunnelViolation."""
        self.ledger.acknowledge(message.received)
        kind = message.WhichOneof("body")
        if kind in ("hello", "welcome") or (kind is None) != (message.number == 0):
            raise TunnelViolation(f"a {kind or 'pulse'} with number {message.number}")
        if self.ledger.kept_messages > self.limits.kept_messages:
            raise TunnelViolation("nothing of what is sent is acknowledged")
        if kind is None or not self.ledger.accept(message.number):
            return None
        match kind:
            case "open":
                return self._opened(message.open)
            case "data":
                return self._data(message.data)
            case "credit":
                return self._credited(message.credit)
            case "end":
                return self._ended(message.end)
            case "exposed" if self._is_node:
                exposed = message.exposed
                return Exposed(exposed.port_id, exposed.address[:MAX_TEXT], exposed.refused[:MAX_TEXT])
            case "expose" if not self._is_node:
                return Expose(message.expose.port_id, message.expose.wish)
            case "withdraw" if not self._is_node:
                return Withdraw(message.withdraw.port_id)
            case "leave" if not self._is_node:
                return Left()
        raise TunnelViolation(f"{kind} is not for this side to say")

    def _opened(self, message: tunnel_pb2.OpenChannel) -> Event | None:
        channel, by_address = message.channel, message.WhichOneof("target") == "address"
        if channel <= self._last_peer or channel % 2 != self._last_peer % 2:
            raise TunnelViolation(f"channel {channel} is opened after {self._last_peer}")
        if by_address == self._is_node or len(message.address) > MAX_TEXT:
            raise TunnelViolation("a channel to nowhere")
        if len(self._channels) >= 2 * self.limits.channels:
            raise TunnelViolation(f"{len(self._channels)} channels, twice as many as may be")
        full = len(self._channels) >= self.limits.channels
        self._last_peer = channel
        self._channels[channel] = _Channel()
        if full:
            self.refused += 1
            self.end(channel, "there are as many channels as may be", abort=True)
            return None
        return Opened(channel, message.port_id, message.address)

    def _data(self, message: tunnel_pb2.ChannelData) -> Event | None:
        channel, size = message.channel, len(message.data)
        state = self._channels.get(channel)
        if state is None or state.peer_ended:
            raise TunnelViolation(f"data in channel {channel}, which is not open")
        if size > min(PIECE_BYTES, state.allowance):
            raise TunnelViolation(f"{size} bytes in channel {channel}, which may take {state.allowance}")
        state.allowance -= size
        if state.aborted:
            return None
        if self._held + size > self.limits.held_bytes:
            self.refused += 1
            self.end(channel, "too much waits in this tunnel", abort=True)
            return Ended(channel, True, "too much waits in this tunnel")
        state.held += size
        self._held += size
        return Data(channel, message.data)

    def _credited(self, message: tunnel_pb2.ChannelCredit) -> Event | None:
        state = self._known(message.channel)
        if state is None:
            return None
        if state.credit + message.bytes > WINDOW_BYTES:
            raise TunnelViolation(f"credit of {message.bytes} bytes for channel {message.channel}, more than was sent")
        state.credit += message.bytes
        return None if state.ended else Credited(message.channel)

    def _ended(self, message: tunnel_pb2.ChannelEnd) -> Event | None:
        channel = message.channel
        state = self._known(channel)
        if state is None:
            return None
        if state.peer_ended and not message.abort:
            raise TunnelViolation(f"channel {channel} ends twice")
        was_over = state.aborted
        state.peer_ended = True
        if message.abort and not state.ended:
            self.end(channel, abort=True)
        elif message.abort or state.ended:
            self._forget(channel)
        return None if was_over else Ended(channel, message.abort, message.reason[:MAX_TEXT])

    def _known(self, channel: int) -> _Channel | None:
        """A channel that is there; None for one that is over, of which the other side may not know yet."""
        state = self._channels.get(channel)
        is_own = channel % 2 == self._last_own % 2
        if state is None and not 0 < channel <= (self._last_own if is_own else self._last_peer):
            raise TunnelViolation(f"there never was a channel {channel}")
        return state

    def _let_go(self, state: _Channel) -> None:
        self._held -= state.held
        state.held = 0

    def _forget(self, channel: int) -> None:
        self._let_go(self._channels.pop(channel))

    def _add(self, **body: object) -> None:
        self.ledger.add(tunnel_pb2.TunnelMessage(**body))  # type: ignore[arg-type]  # one field of the oneof
