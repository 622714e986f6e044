"""The node's end of a tunnel: it makes the connection, makes it again, and leads its channels to its own ports."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from eldric import PROTOCOL
from eldric.accepting import ONE_AT_A_TIME, queueing
from eldric.channels import call_errors, channel
from eldric.errors import DeadlineExceeded, EldricError, InvalidRequest, NotReady, Unavailable
from eldric.names import join_address
from eldric.security import Identity
from eldric.tunnel.carrier import Carrier
from eldric.tunnel.limits import TunnelTimes, TunnelViolation
from eldric.tunnel.session import Event, Exposed, Opened, Session
from eldric.v1 import tunnel_pb2, tunnel_pb2_grpc

log = logging.getLogger(__name__)

#: What the edge takes for the address of a controller.
CONTROLLER = "controller"
#: Longest wait for the edge when a node starts, and for a port, in seconds.
START_S = 15.0
EXPOSE_S = 10.0
#: Longest wait until the edge has heard the good-bye, in seconds.
LEAVE_S = 0.3

_LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class _Port:
    """A port of this node that the edge listens for."""

    port_id: int
    host: str
    port: int
    address: str = ""  # at the edge
    refused: str = ""
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class TunnelClient:
    """One node's tunnel. `edge_id` is the edge's, from `start` on."""

    def __init__(
        self,
        edge: str,
        identity: Callable[[], Identity],
        times: TunnelTimes | None = None,
        on_moved: Callable[[str, str], None] = lambda before, now: None,
    ) -> None:
        """edge: "host:port". `on_moved` hears that an address of this node's at the edge is another now."""
        self.edge = edge
        self.edge_id = ""
        self._identity = identity
        self._times = times or TunnelTimes()
        self._gap_s = self._times.gap_s
        self._on_moved = on_moved
        self._carrier: Carrier | None = None
        self._session_id = b""
        self._connected = asyncio.Event()
        self._ports: dict[int, _Port] = {}
        self._numbers = itertools.count(1)
        self._doors: dict[str, asyncio.Server] = {}
        self._task: asyncio.Task[None] | None = None
        self._problem = ""

    @property
    def session_id(self) -> bytes:
        """The edge's name for the session; empty without one."""
        return self._session_id

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    async def start(self) -> None:
        """Returns once the tunnel is there. Raises Unavailable when the edge is not reached in time."""
        self._task = asyncio.create_task(self._keep(), name="tunnel")
        try:
            async with asyncio.timeout(START_S):
                await self._connected.wait()
        except TimeoutError:
            await self.close()
            raise Unavailable(f"the edge at {self.edge} is not reached: {self._problem or 'no answer'}") from None

    async def expose(self, host: str, port: int) -> str:
        """The "host:port" of the edge by which others reach a port of this node, until `withdraw`.

        host: where this node listens. Raises NotReady when the edge refuses, DeadlineExceeded.
        """
        made = _Port(next(self._numbers), _local(host), port)
        self._ports[made.port_id] = made
        if self._carrier is not None:
            self._carrier.session.expose(made.port_id)
            self._carrier.wake()
        try:
            async with asyncio.timeout(EXPOSE_S):
                await made.settled.wait()
        except TimeoutError:
            self._give_back(made)
            raise DeadlineExceeded(f"the edge at {self.edge} gave no port within {EXPOSE_S:g} s") from None
        if made.refused:
            del self._ports[made.port_id]
            raise NotReady(f"the edge at {self.edge} gives no port: {made.refused}")
        return made.address

    def withdraw(self, address: str) -> None:
        """Others need this address of the edge no longer."""
        for each in [each for each in self._ports.values() if each.address == address]:
            self._give_back(each)

    async def reach(self, address: str) -> str:
        """A "host:port" of this machine that leads, through the edge, to "host:port" or to CONTROLLER."""
        door = self._doors.get(address)
        if door is None:
            loop = asyncio.get_running_loop()
            made = await loop.create_server(lambda: self._enter(address), _LOOPBACK, 0, backlog=ONE_AT_A_TIME)
            door = queueing(made, 100)
            other = self._doors.setdefault(address, door)
            if other is not door:
                door.close()
                door = other
        return join_address(_LOOPBACK, int(door.sockets[0].getsockname()[1]))

    async def close(self) -> None:
        """Says good-bye, closes everything."""
        carrier, until = self._carrier, asyncio.get_running_loop().time() + LEAVE_S
        if carrier is not None:
            carrier.session.leave()
            carrier.wake()
        while carrier is not None and self.connected and carrier.session.ledger.kept_messages:
            if asyncio.get_running_loop().time() > until:
                break
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for door in self._doors.values():
            door.close()
        self._doors.clear()
        self._end_session("the node ends")

    # Streams.

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s, lost_at = self._times.retry_s, loop.time()
        while True:
            try:
                await self._stream()
            except (EldricError, TimeoutError) as error:
                self._problem = str(error) or "no answer"
                if isinstance(error, TunnelViolation | InvalidRequest):
                    self._end_session(self._problem)
            except Exception:
                log.exception("event=tunnel_failed edge=%s", self.edge)
                self._problem = "an error of this node's own, see its log"
            if self._connected.is_set():
                self._connected.clear()
                pause_s, lost_at = self._times.retry_s, loop.time()
                log.warning("event=tunnel_lost edge=%s error=%r", self.edge, self._problem)
            if self._carrier is not None and loop.time() - lost_at > self._gap_s:
                log.warning("event=tunnel_over edge=%s gap_s=%g error=%r", self.edge, self._gap_s, self._problem)
                self._end_session("the tunnel was broken for too long")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._times.max_retry_s)

    async def _stream(self) -> None:
        """One connection to the edge, until it breaks."""
        hello = tunnel_pb2.TunnelMessage(hello=tunnel_pb2.TunnelHello(protocol=PROTOCOL, session=self._session_id))
        if self._carrier is not None:
            hello.received = self._carrier.session.ledger.received
        welcomed: asyncio.Future[tuple[Carrier, int]] = asyncio.get_running_loop().create_future()

        async def outgoing() -> AsyncIterator[tunnel_pb2.TunnelMessage]:
            yield hello
            carrier, stream = await welcomed
            async for message in carrier.outgoing(stream):
                yield message

        async with channel(self.edge, self._identity(), "edge") as connection:
            call = tunnel_pb2_grpc.TunnelStub(connection).Open(outgoing())
            try:
                with call_errors(f"edge at {self.edge}"):
                    answers = call.__aiter__()
                    async with asyncio.timeout(self._times.connect_s):
                        first = await anext(answers)
                    carrier = self._welcomed(first)
                    welcomed.set_result((carrier, carrier.attach(first.received)))
                    self._connected.set()
                    log.info("event=tunnel_connected edge=%s", self.edge)
                    await carrier.take(answers)
            except StopAsyncIteration:
                raise Unavailable(f"the edge at {self.edge} ended the stream") from None
            finally:
                welcomed.cancel()
                call.cancel()

    def _welcomed(self, message: tunnel_pb2.TunnelMessage) -> Carrier:
        """The session that goes on, or a new one."""
        welcome = message.welcome
        if not message.HasField("welcome") or not welcome.session:
            raise TunnelViolation("the edge does not begin with a welcome")
        self.edge_id = welcome.edge_id
        self._gap_s = welcome.gap_ms / 1000 or self._times.gap_s
        if self._carrier is not None and welcome.session == self._session_id:
            return self._carrier
        self._end_session("the edge does not know the session any more")
        self._session_id = welcome.session
        carrier = self._carrier = Carrier(Session(is_node=True), self._times, self._destination, self._heard)
        for port in self._ports.values():
            wish = int(port.address.rpartition(":")[2]) if port.address else 0
            carrier.session.expose(port.port_id, wish)
        return carrier

    def _end_session(self, reason: str) -> None:
        carrier, self._carrier, self._session_id = self._carrier, None, b""
        if carrier is not None:
            log.info("event=session_over edge=%s reason=%r", self.edge, reason)
            carrier.close()

    # Ports and channels.

    def _heard(self, event: Event) -> None:
        if not isinstance(event, Exposed):
            return
        port = self._ports.get(event.port_id)
        if port is None:
            return
        before, port.address, port.refused = port.address, event.address, event.refused
        port.settled.set()
        if before and event.address != before:
            log.warning("event=address_moved before=%s now=%s refused=%r", before, event.address, event.refused)
            self._on_moved(before, event.address)

    def _give_back(self, port: _Port) -> None:
        self._ports.pop(port.port_id, None)
        if self._carrier is not None:
            self._carrier.session.withdraw(port.port_id)
            self._carrier.wake()

    async def _destination(self, opened: Opened) -> tuple[str, int]:
        port = self._ports.get(opened.port_id)
        if port is None:
            raise Unavailable("this port is closed")
        return port.host, port.port

    def _enter(self, address: str) -> Any:
        """Somebody on this machine connects to a door."""
        if self._carrier is None:
            return _Refusal()
        return self._carrier.accept(address=address)


class _Refusal(asyncio.Protocol):
    """There is no tunnel now."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def _local(host: str) -> str:
    """Where a node reaches what it listens for at `host`."""
    if host in ("0.0.0.0", ""):
        return _LOOPBACK
    return "::1" if host == "::" else host
