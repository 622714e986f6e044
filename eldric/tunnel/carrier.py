"""Carries a session's channels: to TCP connections at one end, over one stream of messages after another."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from eldric.errors import QueueIsFull, Unavailable
from eldric.tunnel.limits import TunnelTimes
from eldric.tunnel.pipe import Pipe
from eldric.tunnel.session import Credited, Data, Ended, Event, Opened, Session
from eldric.v1 import tunnel_pb2

log = logging.getLogger(__name__)

#: Where a channel that the other side opened leads. Raises EldricError when it leads nowhere.
Destination = Callable[[Opened], Coroutine[Any, Any, tuple[str, int]]]

#: Longest wait for a connection at a channel's end, in seconds.
CONNECT_S = 5.0
#: Received bytes after which an acknowledgement is sent though nothing else is.
_ACKNOWLEDGE_BYTES = 512 * 1024


class Carrier:
    """A session and its pipes. Everything runs in the event loop."""

    def __init__(
        self, session: Session, times: TunnelTimes, destination: Destination, on_event: Callable[[Event], None]
    ) -> None:
        """`on_event` gets what is not about channels."""
        self.session = session
        #: Bytes of channels, and channels opened, so far.
        self.sent_bytes = self.received_bytes = self.opened = 0
        #: Connections that were refused for want of channels.
        self.refused = 0
        self._times = times
        self._destination = destination
        self._on_event = on_event
        self._pipes: dict[int, Pipe] = {}
        self._port_of: dict[int, int] = {}  # exposed port of a channel that came in there
        self._waiting: dict[int, Pipe] = {}  # for the session's turn, in order
        self._unacknowledged = 0
        self._must_acknowledge = False
        self._stream = 0
        self._more = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False

    # Streams.

    def attach(self, received: int) -> int:
        """A new stream begins, whose other side has got everything up to that number. Returns the stream's number.

        Raises TunnelViolation.
        """
        self.session.ledger.resume(received)
        self._stream += 1
        self._more.set()
        return self._stream

    async def outgoing(self, stream: int) -> AsyncIterator[tunnel_pb2.TunnelMessage]:
        """What is to be sent in that stream, until there is another; a pulse when there is nothing else."""
        loop = asyncio.get_running_loop()
        pulse_at = loop.time() + self._times.pulse_s
        while stream == self._stream:
            message = self.session.next()
            if message is None and not self._must_acknowledge and loop.time() < pulse_at:
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(pulse_at):
                        await self._more.wait()
                continue
            pulse_at = loop.time() + self._times.pulse_s
            self._unacknowledged, self._must_acknowledge = 0, False
            yield message or self.session.pulse()
            self._give_turns()
        self._more.set()  # for the other stream, should this one have taken its wake

    async def take(self, messages: AsyncIterator[tunnel_pb2.TunnelMessage]) -> None:
        """Takes what comes until the stream ends or falls silent. Raises TunnelViolation, Unavailable."""
        while True:
            try:
                async with asyncio.timeout(self._times.silence_s):
                    message = await anext(messages)
            except TimeoutError:
                raise Unavailable(f"the tunnel is silent for {self._times.silence_s:g} s") from None
            except StopAsyncIteration:
                raise Unavailable("the tunnel's stream ended") from None
            self.receive(message)

    def receive(self, message: tunnel_pb2.TunnelMessage) -> None:
        """Does what a message says. Raises TunnelViolation."""
        event = self.session.receive(message)
        self._give_turns()
        match event:
            case None:
                pass
            case Data():
                self._took(len(event.data))
                if event.channel in self._pipes:
                    self._pipes[event.channel].write(event.data)
            case Credited():
                if event.channel in self._pipes:
                    self._pipes[event.channel].go_on()
            case Opened():
                self._open_inwards(event)
            case Ended():
                self._end_inwards(event)
            case _:
                self._on_event(event)
        self._more.set()

    def _give_turns(self) -> None:
        """Channels that wait may send: one after the other, each as much as there is room for."""
        while self._waiting and not self.session.is_busy:
            channel = next(iter(self._waiting))
            self._waiting.pop(channel).go_on()

    def _took(self, count: int) -> None:
        self.received_bytes += count
        self._unacknowledged += count
        if self._unacknowledged >= _ACKNOWLEDGE_BYTES:
            self._must_acknowledge = True

    # Connections.

    def accept(self, *, port_id: int = 0, address: str = "") -> Pipe:
        """The protocol of a connection that this end accepted: it goes into a new channel, or is closed at once."""
        pipe = Pipe()
        if self._closed:
            pipe.abort()
            return pipe
        try:
            if port_id and list(self._port_of.values()).count(port_id) >= self.session.limits.port_channels:
                raise QueueIsFull(f"port {port_id} of the tunnel has as many channels as one may have")
            channel = self.session.open(port_id=port_id, address=address)
        except QueueIsFull as error:
            self.refused += 1
            log.warning("event=tunnel_full error=%r", error.message)
            pipe.abort()
            return pipe
        self._add(channel, pipe)
        if port_id:
            self._port_of[channel] = port_id
        return pipe

    def _add(self, channel: int, pipe: Pipe) -> None:
        pipe.channel = _ChannelEnd(self, channel, pipe)
        self._pipes[channel] = pipe
        self.opened += 1
        self._more.set()

    def _open_inwards(self, event: Opened) -> None:
        pipe = Pipe()
        self._add(event.channel, pipe)
        task = asyncio.create_task(self._connect(event, pipe))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, event: Opened, pipe: Pipe) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                host, port = await self._destination(event)
                await asyncio.get_running_loop().create_connection(lambda: pipe, host, port)
        except Exception as error:
            reason = str(error) or f"no connection within {CONNECT_S:g} s"
            log.info("event=channel_refused channel=%d error=%r", event.channel, reason)
            self.end(event.channel, reason, abort=True)
            self.gone(event.channel)
            pipe.abort()

    def _end_inwards(self, event: Ended) -> None:
        pipe = self._pipes.get(event.channel)
        if pipe is None:
            return
        if event.abort:
            self._pipes.pop(event.channel)
            pipe.abort()
        else:
            pipe.finish()

    # For channels.

    def send(self, channel: int, pipe: Pipe, data: memoryview) -> int:
        taken = self.session.send(channel, data)
        self.sent_bytes += taken
        if taken < len(data) and self.session.is_busy:
            self._waiting[channel] = pipe
        self._more.set()
        return taken

    def passed_on(self, channel: int, count: int) -> None:
        self.session.passed_on(channel, count)
        self._more.set()

    def end(self, channel: int, reason: str, *, abort: bool) -> None:
        self.session.end(channel, reason, abort=abort)
        self._more.set()

    def gone(self, channel: int) -> None:
        """The pipe of a channel has closed."""
        self._pipes.pop(channel, None)
        self._port_of.pop(channel, None)
        self._waiting.pop(channel, None)

    def wake(self) -> None:
        """The session has something to say."""
        self._more.set()

    def close(self) -> None:
        """The session is over: so are all connections."""
        self._closed = True
        for task in self._connecting:
            task.cancel()
        pipes, self._pipes, self._waiting = list(self._pipes.values()), {}, {}
        for pipe in pipes:
            pipe.abort()


class _ChannelEnd:
    """See pipe.Channel."""

    __slots__ = ("_carrier", "_channel", "_pipe")

    def __init__(self, carrier: Carrier, channel: int, pipe: Pipe) -> None:
        self._carrier, self._channel, self._pipe = carrier, channel, pipe

    def send(self, data: memoryview) -> int:
        return self._carrier.send(self._channel, self._pipe, data)

    def passed_on(self, count: int) -> None:
        self._carrier.passed_on(self._channel, count)

    def end(self, reason: str = "", *, abort: bool = False) -> None:
        self._carrier.end(self._channel, reason, abort=abort)

    def gone(self) -> None:
        self._carrier.gone(self._channel)
