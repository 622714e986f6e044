"""Where tunnels may lead: the cluster's nodes, and nowhere else."""

import asyncio
import socket
from urllib.parse import urlsplit

import grpc

from eldric.errors import InvalidRequest, PermissionDenied, Unavailable
from eldric.follower import ControllerFollower
from eldric.names import is_loopback, is_near, split_address
from eldric.node import Node
from eldric.v1 import registry_pb2, registry_pb2_grpc

#: Longest wait for one controller, before the next one is tried.
_TRY_S = 2.0
#: Tensor ports are free ports, which no system gives below this.
_FIRST_FREE_PORT = 1024


class Targets:
    """Follows the registry of one controller at a time, so as to know the cluster's nodes.

    While no controller answers, the nodes that are known stay so.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._nodes: dict[str, registry_pb2.Node] = {}
        follower = ControllerFollower(node, "targets", self._watch)
        self.start, self.stop = follower.start, follower.stop

    async def resolve(self, address: str, caller: str) -> tuple[str, int]:
        """Like `allow`, with the host's IP address: names are looked up once, so that nobody changes them in between.

        What nodes say of their addresses does not lead into the edge's own machine, nor to services that clouds have at
        link-local addresses. Raises OSError for a name that nobody knows.
        """
        host, port = self.allow(address, caller)
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ip = str(found[0][4][0]).partition("%")[0]
        if is_near(ip) and not (is_loopback(ip) and is_loopback(self._node.config.advertised_host)):
            raise PermissionDenied(f"{address} leads to {ip}, where only this edge's own machine is reached")
        return ip, port

    def allow(self, address: str, caller: str) -> tuple[str, int]:
        """Host and port of an address that a node may be connected to: one of another node of this cluster, or a free
        port of another worker's machine, where its tensor endpoints are. caller: the node's id; what it says of
        itself opens nothing.

        Addresses of this edge itself are not its business. Raises PermissionDenied, InvalidRequest.
        """
        host, port = split_address(address)
        edge_id = self._node.config.node_id
        for node in self._nodes.values():
            if node.edge_id == edge_id or node.id in (edge_id, caller):
                continue
            if (host, port) in _faces(node):
                return host, port
            hosts = {face[0] for face in _faces(node)}
            if port >= _FIRST_FREE_PORT and node.kind == registry_pb2.WORKER and host in hosts:
                return host, port
        raise PermissionDenied(f"{address} is no address of a node of this cluster")

    def knows(self, node_id: str) -> bool:
        return node_id in self._nodes

    async def controller(self) -> tuple[str, int]:
        """Host and port of a controller that takes connections. Raises Unavailable."""
        return await self._first(list(self._node.controllers))

    async def join(self) -> tuple[str, int]:
        """Host and port of a controller's join port that takes connections. Raises Unavailable."""
        controllers = [node for node in self._nodes.values() if node.kind == registry_pb2.CONTROLLER]
        return await self._first([node.join_address for node in controllers if node.join_address])

    async def _first(self, addresses: list[str]) -> tuple[str, int]:
        for address in addresses:
            host, port = split_address(address)
            if len(addresses) == 1:
                return host, port  # whoever connects will see
            try:
                async with asyncio.timeout(_TRY_S):
                    _, writer = await asyncio.open_connection(host, port)
            except (OSError, TimeoutError):
                continue
            writer.close()
            return host, port
        raise Unavailable(f"no controller is reached at {', '.join(addresses) or 'any address'}")

    async def _watch(self, connection: grpc.aio.Channel) -> None:
        stub = registry_pb2_grpc.RegistryStub(connection)
        self._replace(await stub.List(registry_pb2.ListNodesRequest()))
        async for event in stub.Watch(registry_pb2.WatchNodesRequest()):
            if event.removed:
                self._nodes.pop(event.node.id, None)
            else:
                self._nodes[event.node.id] = event.node

    def _replace(self, listed: registry_pb2.ListNodesResponse) -> None:
        self._nodes = {node.id: node for node in listed.nodes}


def _faces(node: registry_pb2.Node) -> set[tuple[str, int]]:
    """Host and port of a node's gRPC, HTTP and join ports."""
    found = set()
    for address in (node.grpc_address, urlsplit(node.http_url).netloc, node.join_address):
        try:
            found.add(split_address(address))
        except InvalidRequest:
            continue
    return found
