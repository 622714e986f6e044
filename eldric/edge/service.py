"""Tunnel: every node's tunnel, who may have one, and where it may lead."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from eldric import PROTOCOL
from eldric.edge.config import EdgeConfig
from eldric.edge.metrics import EdgeMetrics, Totals, tunnel_metrics
from eldric.edge.targets import Targets
from eldric.edge.tunnel import NodeTunnel
from eldric.errors import DeadlineExceeded, EldricError, InvalidRequest, PermissionDenied, QueueIsFull, VersionMismatch
from eldric.security import caller_of
from eldric.tunnel.client import CONTROLLER
from eldric.v1 import tunnel_pb2, tunnel_pb2_grpc

#: Longest wait for a node's hello, in seconds.
_HELLO_S = 5.0


class TunnelService(tunnel_pb2_grpc.TunnelServicer, Collector):
    """The table of tunnels: one for each node. It gives the metrics of what there is."""

    def __init__(self, config: EdgeConfig, targets: Targets, metrics: EdgeMetrics) -> None:
        self._config = config
        self._targets = targets
        self._metrics = metrics
        self._tunnels: dict[str, NodeTunnel] = {}
        self._over = Totals()

    async def Open(
        self, request_iterator: AsyncIterator[tunnel_pb2.TunnelMessage], context: Any
    ) -> AsyncIterator[tunnel_pb2.TunnelMessage]:
        node_id = caller_of(context).node_id
        requests = request_iterator.__aiter__()
        try:
            hello = await _hello(requests)
            tunnel = self._enter(node_id, hello.hello)
        except EldricError:
            self._metrics.refused.labels("tunnel").inc()
            raise
        try:
            async for message in tunnel.serve(hello, requests, _peer(context)):
                yield message
        except InvalidRequest:
            self._metrics.refused.labels("tunnel").inc()
            tunnel.close("it broke the rules")
            raise

    async def Tunnels(self, request: tunnel_pb2.ListTunnelsRequest, context: object) -> tunnel_pb2.ListTunnelsResponse:
        return tunnel_pb2.ListTunnelsResponse(tunnels=self.statuses())

    def statuses(self) -> list[tunnel_pb2.TunnelStatus]:
        return [tunnel.status() for tunnel in list(self._tunnels.values())]

    def _enter(self, node_id: str, hello: tunnel_pb2.TunnelHello) -> NodeTunnel:
        """The tunnel that goes on, or a new one. Raises VersionMismatch, PermissionDenied, QueueIsFull."""
        if hello.protocol != PROTOCOL:
            raise VersionMismatch(f"the node speaks protocol {hello.protocol}, this edge {PROTOCOL}")
        if hello.session:
            for tunnel in self._tunnels.values():
                if tunnel.session_id != hello.session:
                    continue
                if tunnel.node_id != node_id:
                    raise PermissionDenied("the session is another node's")
                self._metrics.streams.labels("resumed").inc()
                return tunnel
        before = self._tunnels.get(node_id)
        if before is not None:
            before.close("the node began a new session")
        if len(self._tunnels) >= self._config.tunnels:
            raise QueueIsFull(f"this edge has {len(self._tunnels)} tunnels, it takes no more")
        self._metrics.streams.labels("new").inc()
        tunnel = self._tunnels[node_id] = NodeTunnel(self._config, node_id, self._resolve, self._ended)
        return tunnel

    def _ended(self, tunnel: NodeTunnel) -> None:
        """A session is over."""
        self._over.add(tunnel.status())
        self._metrics.over.labels(tunnel.over.partition(":")[0]).inc()
        self._metrics.refused.labels("channel").inc(tunnel.refused_channels)
        self._metrics.refused.labels("port").inc(tunnel.refused_ports)
        if self._tunnels.get(tunnel.node_id) is tunnel:
            del self._tunnels[tunnel.node_id]

    async def _resolve(self, node_id: str, address: str) -> tuple[str, int]:
        """Where a channel leads that this node opened. Raises EldricError."""
        if address == CONTROLLER:
            return await self._targets.controller()
        for tunnel in self._tunnels.values():
            if (local := tunnel.local_port(address)) is not None:
                return local
        try:
            return await self._targets.resolve(address, node_id)
        except EldricError:
            self._metrics.refused.labels("address").inc()
            raise

    async def close(self) -> None:
        """The edge ends: so do all sessions."""
        for tunnel in list(self._tunnels.values()):
            tunnel.close("the edge ended")

    def look(self) -> tuple[bool, dict[str, Any]]:
        """For /health."""
        connected = sum(tunnel.connected for tunnel in self._tunnels.values())
        return True, {"tunnels": connected, "tunnels_waiting": len(self._tunnels) - connected}

    def collect(self) -> Iterable[Metric]:
        """For Prometheus."""
        return tunnel_metrics(self.statuses(), self._over)


async def _hello(requests: AsyncIterator[tunnel_pb2.TunnelMessage]) -> tunnel_pb2.TunnelMessage:
    """The first message. Raises InvalidRequest when it is no hello, DeadlineExceeded."""
    try:
        async with asyncio.timeout(_HELLO_S):
            message = await anext(requests)
    except TimeoutError:
        raise DeadlineExceeded(f"no hello within {_HELLO_S:g} s") from None
    except StopAsyncIteration:
        raise InvalidRequest("a tunnel begins with a hello") from None
    if not message.HasField("hello") or message.number:
        raise InvalidRequest("a tunnel begins with a hello")
    return message


def _peer(context: Any) -> str:
    """Where the node connected from: gRPC says "ipv4:10.0.0.7:41000"."""
    return str(context.peer()).partition(":")[2] if hasattr(context, "peer") else ""
