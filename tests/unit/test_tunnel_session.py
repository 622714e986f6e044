"""Sessions of a tunnel: two ends, a stream between them that breaks and comes back, and ends that break the rules."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldric.errors import QueueIsFull
from eldric.tunnel.limits import PIECE_BYTES, WINDOW_BYTES, TunnelLimits, TunnelViolation
from eldric.tunnel.session import (
    BACKLOG_BYTES,
    SMALL_BYTES,
    Credited,
    Data,
    Ended,
    Event,
    Expose,
    Exposed,
    Left,
    Opened,
    Session,
    Withdraw,
)
from eldric.v1.tunnel_pb2 import (
    ChannelCredit,
    ChannelData,
    ChannelEnd,
    ExposePort,
    OpenChannel,
    PortExposed,
    TunnelHello,
    TunnelLeave,
    TunnelMessage,
    TunnelWelcome,
)


@dataclass
class End:
    """One end, and what it heard."""

    session: Session
    events: list[Event] = field(default_factory=list)
    arrived: dict[int, bytes] = field(default_factory=lambda: defaultdict(bytes))

    def take(self, message: TunnelMessage) -> None:
        event = self.session.receive(TunnelMessage.FromString(message.SerializeToString()))
        if isinstance(event, Data):
            self.arrived[event.channel] += event.data
            self.session.passed_on(event.channel, len(event.data))
        if event is not None:
            self.events.append(event)


class Pair:
    """A node and an edge, and messages under way between them."""

    def __init__(self, **limits: int) -> None:
        self.node = End(Session(is_node=True, limits=TunnelLimits(**limits)))
        self.edge = End(Session(is_node=False, limits=TunnelLimits(**limits)))

    def settle(self) -> None:
        """All that both have to say has arrived, and is acknowledged."""
        said = True
        while said:
            said = self.step(self.node, self.edge) or self.step(self.edge, self.node)
        self.edge.take(self.node.session.pulse())
        self.node.take(self.edge.session.pulse())

    def step(self, sender: End, receiver: End, lost: bool = False) -> bool:
        message = sender.session.next()
        if message is not None and not lost:
            receiver.take(message)
        return message is not None

    def come_back(self) -> None:
        """A new stream: each side learns what the other has got."""
        for one, other in ((self.node, self.edge), (self.edge, self.node)):
            one.session.ledger.resume(other.session.ledger.received)


def opened() -> tuple[Pair, int]:
    """A channel that the node opened to a controller."""
    pair = Pair()
    channel = pair.node.session.open(address="controller")
    pair.settle()
    return pair, channel


def test_bytes_go_both_ways_in_order() -> None:
    pair, channel = opened()
    assert pair.edge.events == [Opened(channel, 0, "controller")]
    assert pair.node.session.send(channel, memoryview(b"question")) == 8
    assert pair.edge.session.send(channel, memoryview(b"answer")) == 6
    assert pair.node.session.send(channel, memoryview(b" two")) == 4
    pair.settle()
    assert pair.edge.arrived[channel] == b"question two"
    assert pair.node.arrived[channel] == b"answer"


def test_a_window_is_sent_and_no_more_until_the_other_side_passed_it_on() -> None:
    pair, channel = opened()
    assert send_all(pair, channel, 2 * WINDOW_BYTES) == WINDOW_BYTES
    pair.settle()
    assert Credited(channel) in pair.node.events
    assert send_all(pair, channel, 2 * WINDOW_BYTES) == WINDOW_BYTES


def send_all(pair: Pair, channel: int, size: int) -> int:
    """How many bytes the node may send without hearing of the edge."""
    sent = 0
    while (taken := pair.node.session.send(channel, memoryview(bytes(size - sent)))) > 0:
        sent += taken
        while pair.step(pair.node, pair.edge):
            pass
    return sent


def test_a_channel_with_much_to_send_leaves_room_for_others() -> None:
    """What waits for the stream is bounded, and little things need not wait for it."""
    pair, channel = opened()
    other = pair.node.session.open(address="controller")
    taken = pair.node.session.send(channel, memoryview(bytes(WINDOW_BYTES)))
    assert BACKLOG_BYTES <= taken < BACKLOG_BYTES + PIECE_BYTES
    assert pair.node.session.is_busy
    assert pair.node.session.send(other, memoryview(bytes(SMALL_BYTES + 1))) == 0
    assert pair.node.session.send(other, memoryview(bytes(SMALL_BYTES))) == SMALL_BYTES
    pair.settle()
    assert not pair.node.session.is_busy


def test_what_was_lost_with_a_stream_is_sent_again_once() -> None:
    pair, channel = opened()
    for piece in (b"a", b"b", b"c", b"d"):
        pair.node.session.send(channel, memoryview(piece))
    pair.step(pair.node, pair.edge)
    pair.step(pair.node, pair.edge, lost=True)
    pair.step(pair.node, pair.edge, lost=True)
    pair.come_back()
    pair.settle()
    assert pair.edge.arrived[channel] == b"abcd"
    assert pair.node.session.ledger.kept_messages == 0
    assert pair.node.session.ledger.kept_bytes == 0


def test_a_message_that_comes_twice_counts_once() -> None:
    pair, channel = opened()
    pair.node.session.send(channel, memoryview(b"once"))
    message = pair.node.session.next()
    assert message is not None
    pair.edge.take(message)
    pair.edge.take(message)
    assert pair.edge.arrived[channel] == b"once"


def test_a_channel_is_over_when_both_sides_have_ended_it() -> None:
    pair, channel = opened()
    pair.node.session.end(channel)
    pair.settle()
    assert pair.edge.events[-1] == Ended(channel, False, "")
    assert pair.edge.session.send(channel, memoryview(b"late")) == 4  # the other direction is open
    pair.settle()
    assert pair.node.arrived[channel] == b"late"
    pair.edge.session.end(channel)
    pair.settle()
    assert pair.node.session.channels == pair.edge.session.channels == 0


def test_an_abort_ends_both_directions() -> None:
    pair, channel = opened()
    pair.edge.session.send(channel, memoryview(b"under way"))
    pair.node.session.end(channel, "connection reset", abort=True)
    pair.settle()
    assert pair.edge.events[-1] == Ended(channel, True, "connection reset")
    assert pair.node.arrived[channel] == b""
    assert pair.node.session.channels == pair.edge.session.channels == 0


def test_ends_that_cross_break_nothing() -> None:
    """Credit and an abort may be under way for a channel that is over for the one who gets them."""
    pair, channel = opened()
    node, edge = pair.node.session, pair.edge.session
    send_all(pair, channel, WINDOW_BYTES // 2)  # the edge has given credit by now
    edge.end(channel)
    node.end(channel)
    pair.step(pair.node, pair.edge)  # the edge: both have ended
    edge.end(channel, abort=True)
    pair.settle()
    assert node.channels == edge.channels == 0


def test_ports_are_asked_for_and_given_back() -> None:
    pair = Pair()
    pair.node.session.expose(3, wish=4100)
    pair.settle()
    pair.edge.session.exposed(3, "203.0.113.9:4100")
    pair.node.session.withdraw(3)
    pair.node.session.leave()
    pair.settle()
    assert pair.edge.events == [Expose(3, 4100), Withdraw(3), Left()]
    assert pair.node.events == [Exposed(3, "203.0.113.9:4100", "")]


def test_own_channels_are_bounded() -> None:
    pair = Pair(channels=2)
    pair.node.session.open(address="controller")
    pair.node.session.open(address="controller")
    with pytest.raises(QueueIsFull):
        pair.node.session.open(address="controller")


def test_channels_beyond_the_limit_are_refused_one_by_one() -> None:
    pair = Pair(channels=4)
    pair.edge.session.limits = TunnelLimits(channels=1)
    first, second = (pair.node.session.open(address="controller") for _ in range(2))
    pair.settle()
    assert pair.edge.session.refused == 1
    assert [event for event in pair.edge.events if isinstance(event, Opened)] == [Opened(first, 0, "controller")]
    assert [event.channel for event in pair.node.events if isinstance(event, Ended) and event.abort] == [second]
    assert pair.node.session.channels == pair.edge.session.channels == 1


def test_what_is_kept_is_bounded() -> None:
    pair = Pair(kept_bytes=3 * PIECE_BYTES)
    channel = pair.node.session.open(address="controller")
    sent = 0
    while (taken := pair.node.session.send(channel, memoryview(bytes(WINDOW_BYTES)))) > 0:
        sent += taken
        while pair.node.session.next() is not None:  # it is on its way, and nobody acknowledges
            pass
    assert sent <= 3 * PIECE_BYTES
    assert pair.node.session.is_full
    pair.come_back()
    pair.settle()
    assert not pair.node.session.is_full


def test_a_channel_that_brings_more_than_may_be_held_is_ended() -> None:
    edge = Session(is_node=False, limits=TunnelLimits(held_bytes=PIECE_BYTES))
    send(edge, 1, open=OpenChannel(channel=1, address="controller"))
    send(edge, 2, data=ChannelData(channel=1, data=bytes(PIECE_BYTES)))
    assert send(edge, 3, data=ChannelData(channel=1, data=b"x")) == Ended(1, True, "too much waits in this tunnel")
    assert edge.refused == 1
    assert send(edge, 4, data=ChannelData(channel=1, data=b"x")) is None


def test_an_end_that_never_acknowledges_is_not_served_for_ever() -> None:
    edge = Session(is_node=False, limits=TunnelLimits(kept_messages=10))
    with pytest.raises(TunnelViolation, match="acknowledged"):
        for number in range(1, 100):
            send(edge, number, expose=ExposePort(port_id=number))
            edge.exposed(number, "")


def send(session: Session, number: int, received: int = 0, **body: object) -> Event | None:
    return session.receive(TunnelMessage(number=number, received=received, **body))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "messages",
    [
        [TunnelMessage(number=1, data=ChannelData(channel=1, data=b"x"))],
        [TunnelMessage(number=1, data=ChannelData(channel=7, data=b"x"))],
        [TunnelMessage(number=1, credit=ChannelCredit(channel=9, bytes=1))],
        [TunnelMessage(number=1, end=ChannelEnd(channel=2))],
        [TunnelMessage(number=2, leave=TunnelLeave())],
        [TunnelMessage(number=0, leave=TunnelLeave())],
        [TunnelMessage(number=1)],
        [TunnelMessage(received=1)],
        [TunnelMessage(number=1, hello=TunnelHello())],
        [TunnelMessage(welcome=TunnelWelcome())],
        [TunnelMessage(number=1, exposed=PortExposed(port_id=1, address="a:1"))],
        [TunnelMessage(number=1, open=OpenChannel(channel=2, address="controller"))],
        [TunnelMessage(number=1, open=OpenChannel(channel=1, port_id=4))],
        [TunnelMessage(number=1, open=OpenChannel(channel=1, address="x" * 600))],
        [
            TunnelMessage(number=1, open=OpenChannel(channel=3, address="controller")),
            TunnelMessage(number=2, open=OpenChannel(channel=1, address="controller")),
        ],
        [
            TunnelMessage(number=1, open=OpenChannel(channel=1, address="controller")),
            TunnelMessage(number=2, data=ChannelData(channel=1, data=bytes(PIECE_BYTES + 1))),
        ],
        [
            TunnelMessage(number=1, open=OpenChannel(channel=1, address="controller")),
            TunnelMessage(number=2, credit=ChannelCredit(channel=1, bytes=1)),
        ],
        [
            TunnelMessage(number=1, open=OpenChannel(channel=1, address="controller")),
            TunnelMessage(number=2, end=ChannelEnd(channel=1)),
            TunnelMessage(number=3, data=ChannelData(channel=1, data=b"x")),
        ],
        [
            TunnelMessage(number=1, open=OpenChannel(channel=1, address="controller")),
            TunnelMessage(number=2, end=ChannelEnd(channel=1)),
            TunnelMessage(number=3, end=ChannelEnd(channel=1)),
        ],
    ],
)
def test_who_breaks_the_rules_is_told_off(messages: list[TunnelMessage]) -> None:
    edge = Session(is_node=False)
    for message in messages[:-1]:
        edge.receive(message)
    with pytest.raises(TunnelViolation):
        edge.receive(messages[-1])


def test_a_window_overrun_is_told_off() -> None:
    edge = Session(is_node=False)
    send(edge, 1, open=OpenChannel(channel=1, address="controller"))
    whole = WINDOW_BYTES // PIECE_BYTES
    for number in range(2, 2 + whole):
        send(edge, number, data=ChannelData(channel=1, data=bytes(PIECE_BYTES)))
    with pytest.raises(TunnelViolation, match="may take 0"):
        send(edge, 2 + whole, data=ChannelData(channel=1, data=b"x"))


def test_channels_without_end_are_told_off() -> None:
    edge = Session(is_node=False, limits=TunnelLimits(channels=3))
    with pytest.raises(TunnelViolation, match="twice as many"):
        for number in range(1, 100):
            send(edge, number, open=OpenChannel(channel=2 * number - 1, address="controller"))


def test_a_stream_cannot_come_back_to_before_what_was_acknowledged() -> None:
    pair, _ = opened()
    with pytest.raises(TunnelViolation):
        pair.node.session.ledger.resume(0)
    with pytest.raises(TunnelViolation):
        pair.node.session.ledger.resume(9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("nNeEsSlLrxo"), st.integers(1, 300_000)), max_size=60))
def test_whatever_breaks_every_byte_arrives_once_and_in_order(moves: list[tuple[str, int]]) -> None:
    """Sends, steps and losses in any order: n/N and e/E send in one of two channels, s/S step, l/L lose, r comes back,
    o ends a channel at the node."""
    pair = Pair()
    channels = [pair.node.session.open(address="controller"), pair.node.session.open(address="controller")]
    sent: dict[tuple[str, int], bytes] = defaultdict(bytes)
    broken = False
    for move, count in moves:
        side, channel = ("node" if move in "nN" else "edge"), channels[move.isupper()]
        if move in "nNeE":
            if move in "eE" and not any(isinstance(e, Opened) and e.channel == channel for e in pair.edge.events):
                continue
            end = pair.node if side == "node" else pair.edge
            data = bytes([count % 251]) * count
            sent[side, channel] += data[: end.session.send(channel, memoryview(data))]
        elif move in "sSlL":
            one, other = (pair.node, pair.edge) if move.islower() else (pair.edge, pair.node)
            broken = broken or move in "lL"
            pair.step(one, other, lost=broken)
        elif move == "r" and broken:
            pair.come_back()
            broken = False
        elif move == "o":
            pair.node.session.end(channels[count % 2])
    pair.come_back()
    pair.settle()
    for channel in channels:
        assert pair.edge.arrived[channel] == sent["node", channel]
        assert pair.node.arrived[channel] == sent["edge", channel]
    assert pair.node.session.ledger.kept_messages == pair.edge.session.ledger.kept_messages == 0
