"""A stage's place in the ring: what it receives from the stage before, what it sends to the next, and when."""

import hashlib
import math
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from eldric.engine.schedule import Step
from eldric.engine.step import Hidden
from eldric.transport.base import Link, Peer, Transport
from eldric.transport.errors import LinkClosed, PeerLost
from eldric.transport.frame import Frame, FrameDtype, FrameKind, Header, Payload, Run, StageTrace
from eldric.v1 import frame_pb2, stage_pb2

#: Longest wait for room at the next stage: a peer that is alive but takes nothing for so long is as good as lost.
_SEND_S = 30.0

#: How often a stage that sends by another transport than it receives by looks whether the next stage is lost, where
#: that transport does not say so by itself; and where it does.
_LOOK_S, _LONG_LOOK_S = 0.02, 1.0

#: How long no frame must have come for a stage to bring its counters up to date, and how often it does so; and at most,
#: while it knows no round trip because a neighbour was slow to answer.
_REST_S, _RESTS, _MOST_RESTS = 0.05, 5, 20

#: (received_ns, began_ns, computed_ns) of a step in this stage.
Times = tuple[int, int, int]


def clock_id() -> int:
    """Names the clock of time.perf_counter_ns: equal for all processes since one boot of one machine; never 0."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = f"{uuid.getnode()}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) or 1


def frame_epoch(epoch: int, round: int) -> int:
    """The epoch that frames carry: it grows with the pipeline's epoch and, within it, with each connection."""
    return epoch << 32 | round


class Ring:
    """What a stage receives and sends with, and its link to the next. Used by the stage's compute thread.

    `wake` and the read-only attributes may be used by any thread.
    """

    def __init__(self, transport: Transport, stage: int) -> None:
        self._receiver = self._sender = transport
        self._recv: Callable[[float], Frame | None] = transport.recv
        self._look_at = 0.0  # when to look at the sender next, where it is another transport, and how often
        self._look_s = _LOOK_S
        self._rests, self._patience_s = 0, _REST_S
        self._stage = stage
        self._clock = clock_id()
        self._link: Link | None = None
        self.fallback = ""  # why the link is not of a better transport
        self.tracing = False  # the head: whether steps are timed

    @property
    def dropped(self) -> dict[str, int]:
        """Frames that were not let in, by reason. May be read from any thread."""
        return dict(self._receiver.stats.dropped)

    @property
    def refused(self) -> int:
        """Connections that were refused. May be read from any thread."""
        return self._receiver.stats.refused

    def connect(self, peer: Peer | None, allowed: Collection[str], epoch: int, round: int, timeout_s: float) -> None:
        """Let the stage before in, and reach the next one (None: this stage is alone). Raises TransportError."""
        self._receiver.allow(allowed)
        self._receiver.set_epoch(frame_epoch(epoch, round))
        if self._sender is not self._receiver:
            self._sender.allow(())
            self._sender.set_epoch(frame_epoch(epoch, round))
        if peer is not None:
            self._link = self._sender.connect(peer, timeout_s)

    def rewire(self, receiver: Transport, sender: Transport, *, keep: bool = False) -> None:
        """Receive and send with these from now on; what is of no use any more is closed, unless somebody else will."""
        before = {self._receiver, self._sender}
        if sender is not self._sender:
            self._link, self.fallback = None, ""
        self._receiver, self._sender = receiver, sender
        self._recv = receiver.recv
        if sender is not receiver:
            self._recv = self._receive_and_look
            self._look_s = _LONG_LOOK_S if sender.on_loss(self._look_now) else _LOOK_S
        for transport in before - {receiver, sender} if not keep else ():
            transport.close()

    @property
    def link_status(self) -> stage_pb2.LinkStatus | None:
        """The link to the next stage; None before there is one. May be read from any thread."""
        link, sender = self._link, self._sender
        if link is None:
            return None
        stats = link.stats
        return stage_pb2.LinkStatus(
            to_stage=link.peer.stage,
            transport=sender.scheme,
            encryption=sender.encryption,
            round_trip_ms=stats.round_trip_s * 1000,
            frames=stats.frames,
            bytes=stats.bytes,
            queue_frames=stats.queue_frames,
            queue_bytes=stats.queue_bytes,
            fallback=self.fallback,
            closed=link.closed or "",
        )

    @property
    def link_closed(self) -> tuple[int, str] | None:
        """The next stage and why the link to it is closed; None while it is good."""
        link = self._link
        return None if link is None or link.closed is None else (link.peer.stage, link.closed)

    def receive(self, timeout_s: float) -> Frame | None:
        """The next frame; None after a wake or the timeout, or earlier. Raises PeerLost, TransportClosed."""
        try:
            frame = self._recv(timeout_s if timeout_s < self._patience_s else self._patience_s)
            if frame is None:
                if timeout_s:
                    self._rest()
            elif self._rests:
                self._rests, self._patience_s = 0, _REST_S
            return frame
        except PeerLost as lost:
            if lost.inbound or self._link is None or self._link.closed is not None:
                raise
            return None  # the end of a link that was replaced since

    def wake(self) -> None:
        self._receiver.wake()

    def send_step(self, step: Step, hidden: Hidden, times: Times) -> None:
        """The head sends a step on its way. hidden: [rows, hidden_size]. Raises TransportError."""
        header = Header(
            kind=FrameKind.HIDDEN,
            step=step.number,
            lane=step.lane,
            dtype=FrameDtype.F32,
            shape=hidden.shape,
            runs=tuple([Run(*run) for run in step.runs]),
        )
        if self.tracing:
            header.trace = self.trace(times)
        self._send(header, hidden)

    def send_hidden(self, header: Header, hidden: Hidden, times: Times) -> None:
        """A middle stage sends on the step that it got with `header`."""
        if header.trace:
            header.trace += self.trace(times)
        self._send(header, hidden)

    def send_tokens(self, header: Header, answer: frame_pb2.StepTokens, times: Times) -> None:
        """The tail answers the step that it got with `header`; any stage does, with an error."""
        header.kind, header.dtype, header.shape, header.runs = FrameKind.TOKENS, FrameDtype.BYTES, (), ()
        if header.trace:
            header.trace += self.trace(times)
        self._send(header, answer.SerializeToString())

    def send_control(self, kind: FrameKind, payload: bytes) -> None:
        """The head opens or closes a sequence."""
        self._send(Header(kind=kind), payload)

    def pass_on(self, frame: Frame) -> None:
        self._send(frame.header, frame.payload)

    def trace(self, times: Times) -> tuple[StageTrace, ...]:
        """This stage's entry in a traced frame, sent now."""
        return (StageTrace(self._stage, self._clock, *times, time.perf_counter_ns()),)

    def close(self) -> None:
        for transport in {self._receiver, self._sender}:
            transport.close()

    def _receive_and_look(self, timeout_s: float) -> Frame | None:
        """As Transport.recv, and raises the end of the link to the next stage, which only its own transport knows."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._look_s
            self._sender.recv(0)
        return self._receiver.recv(min(timeout_s, self._look_s))

    def _rest(self) -> None:
        """There is nothing to do: bring the links' counters up to date, a few times, as the neighbours do so too."""
        self._rests += 1
        is_known = self._link is None or self._link.stats.round_trip_s > 0
        if self._rests > (_RESTS if is_known else _MOST_RESTS):
            self._patience_s = math.inf
            return
        ask = (self._rests - 2 - self._stage) % (_RESTS - 1) == 0 and self._rests > 1  # not when neighbours do
        for transport in {self._receiver, self._sender}:
            transport.settle(ask)

    def _look_now(self) -> None:
        """The sender has noticed something. Any thread."""
        self._look_at = 0.0
        self._receiver.wake()

    def _send(self, header: Header, payload: Payload) -> None:
        if self._link is None:
            raise LinkClosed("this stage is not connected")
        self._link.send(header, payload, _SEND_S)
