"""One node's tunnel at the edge: its session, its ports, and the stream that it has now."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from eldric.accepting import ONE_AT_A_TIME, queueing
from eldric.edge.config import EdgeConfig
from eldric.errors import Unavailable
from eldric.tunnel.carrier import Carrier
from eldric.tunnel.limits import TunnelViolation
from eldric.tunnel.session import Event, Expose, Left, Opened, Session, Withdraw
from eldric.v1 import tunnel_pb2

log = logging.getLogger(__name__)

#: Host and port for an address that a node, given by its id, asks for. Raises EldricError.
Resolve = Callable[[str, str], Coroutine[Any, Any, tuple[str, int]]]


class NodeTunnel:
    """Lives as long as the session, over several streams. `over` says why it ended."""

    def __init__(
        self, config: EdgeConfig, node_id: str, resolve: Resolve, on_over: Callable[["NodeTunnel"], None]
    ) -> None:
        self.node_id = node_id
        self.session_id = secrets.token_bytes(16)
        self.over = ""
        self.peer = ""
        self.streams = 0
        self.refused_ports = 0
        self.ports: dict[int, tuple[str, asyncio.Server]] = {}  # address and server by the node's number
        self._config = config
        self._resolve = resolve
        self._on_over = on_over
        self._session = Session(is_node=False, limits=config.limits)
        self._carrier = Carrier(self._session, config.times, self._destination, self._heard)
        self._taking: asyncio.Task[None] | None = None
        self._gap: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return self._taking is not None

    def status(self) -> tunnel_pb2.TunnelStatus:
        carrier = self._carrier
        return tunnel_pb2.TunnelStatus(
            node_id=self.node_id,
            connected=self.connected,
            peer=self.peer,
            streams=self.streams,
            channels=self._session.channels,
            channels_total=carrier.opened,
            sent_bytes=carrier.sent_bytes,
            received_bytes=carrier.received_bytes,
            kept_bytes=self._session.ledger.kept_bytes,
            ports=[address for address, _ in self.ports.values()],
        )

    @property
    def refused_channels(self) -> int:
        return self._session.refused + self._carrier.refused

    async def serve(
        self, hello: tunnel_pb2.TunnelMessage, requests: AsyncIterator[tunnel_pb2.TunnelMessage], peer: str
    ) -> AsyncIterator[tunnel_pb2.TunnelMessage]:
        """One stream, until it breaks, another one takes its place, or the session is over. Raises TunnelViolation."""
        received = self._session.ledger.received
        stream = self._carrier.attach(hello.received)
        if self._taking is not None:  # of a stream that broke unnoticed
            self._taking.cancel()
        if self._gap is not None:
            self._gap.cancel()
        self.peer, self.streams = peer, self.streams + 1
        taking = self._taking = asyncio.create_task(self._carrier.take(requests), name=f"tunnel {self.node_id}")
        taking.add_done_callback(lambda _: self._carrier.wake())
        welcome = tunnel_pb2.TunnelWelcome(
            session=self.session_id, edge_id=self._config.node.node_id, gap_ms=round(self._config.times.gap_s * 1000)
        )
        try:
            yield tunnel_pb2.TunnelMessage(received=received, welcome=welcome)
            async for message in self._carrier.outgoing(stream):
                if taking.done() or self.over:
                    break
                yield message
            self._raise_end(taking)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            if self._taking is taking:
                self._taking = None
                self._wait_for_return()

    def _raise_end(self, taking: "asyncio.Task[None]") -> None:
        if taking.done() and not taking.cancelled() and (error := taking.exception()) is not None:
            if isinstance(error, TunnelViolation):
                self.close(f"it broke the rules: {error}")
            raise error
        raise Unavailable(self.over or "another stream took this one's place")

    def _wait_for_return(self) -> None:
        """The stream is gone: the session waits for another one."""
        if not self.over:
            gap_s = self._config.times.gap_s
            log.info("event=tunnel_broken node=%s gap_s=%g", self.node_id, gap_s)
            self._gap = asyncio.get_running_loop().call_later(gap_s, self.close, "it did not come back")

    def close(self, reason: str) -> None:
        """The session is over: all its channels and ports are gone."""
        if self.over:
            return
        self.over = reason
        log.info("event=session_over node=%s reason=%r", self.node_id, reason)
        if self._gap is not None:
            self._gap.cancel()
        for task in self._opening:
            task.cancel()
        for _, server in self.ports.values():
            server.close()
        self.ports.clear()
        self._carrier.close()
        self._carrier.wake()
        self._on_over(self)

    def _heard(self, event: Event) -> None:
        match event:
            case Expose():
                if event.port_id in self.ports or len(self.ports) + len(self._opening) >= self._config.limits.ports:
                    self._answer(event.port_id, "", "this number is in use, or there are as many ports as may be")
                    self.refused_ports += 1
                    return
                task = asyncio.create_task(self._expose(event))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            case Withdraw():
                if event.port_id in self.ports:
                    self.ports.pop(event.port_id)[1].close()
            case Left():
                self.close("the node left")

    async def _expose(self, event: Expose) -> None:
        try:
            server = await self._listen(event)
        except OSError as error:
            log.warning("event=port_refused node=%s error=%r", self.node_id, str(error))
            self.refused_ports += 1
            self._answer(event.port_id, "", str(error))
            return
        if self.over or event.port_id in self.ports:
            server.close()
            return
        address = self._config.node.advertised(int(server.sockets[0].getsockname()[1]))
        self.ports[event.port_id] = address, server
        log.info("event=port_opened node=%s address=%s", self.node_id, address)
        self._answer(event.port_id, address, "")

    async def _listen(self, event: Expose) -> asyncio.Server:
        """On the port that the node had before, or a free one of those that this edge gives. Raises OSError."""
        loop = asyncio.get_running_loop()
        first, last = self._config.ports or (0, 0)
        choices = [event.wish] if self._may_be(event.wish) else []
        problem = OSError("all ports that this edge gives are in use")
        for port in [*choices, *(range(first, last + 1) if self._config.ports else (0,))]:
            try:
                server = await loop.create_server(
                    lambda: self._carrier.accept(port_id=event.port_id),
                    self._config.node.host,
                    port,
                    backlog=ONE_AT_A_TIME,
                )
                return queueing(server, 16)
            except OSError as error:
                problem = error
        raise problem

    def _may_be(self, wish: int) -> bool:
        first, last = self._config.ports or (1024, 65535)
        return first <= wish <= last

    def _answer(self, port_id: int, address: str, refused: str) -> None:
        self._session.exposed(port_id, address, refused)
        self._carrier.wake()

    async def _destination(self, opened: Opened) -> tuple[str, int]:
        return await self._resolve(self.node_id, opened.address)

    def local_port(self, address: str) -> tuple[str, int] | None:
        """Where on this machine an address of this tunnel's ports listens."""
        for known, server in self.ports.values():
            if known == address:
                host, port = server.sockets[0].getsockname()[:2]
                return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port)
        return None
