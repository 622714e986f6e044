"""The client's connections: to a controller that answers, and to nodes that the controller knows."""

import contextlib
import time
from collections.abc import Iterator

import grpc

from eldric.channels import ChannelPool, call_errors
from eldric.client.cluster import Cluster
from eldric.errors import Unavailable
from eldric.v1 import registry_pb2, registry_pb2_grpc

#: How long a controller may take to answer before the next one is tried, in seconds.
_PROBE_S = 2.0
#: How long a list of routers or data workers is used before it is asked for again, in seconds.
_NODES_S = 2.0

_TITLES = {registry_pb2.ROUTER: "router", registry_pb2.DATA: "data worker"}


def none_up(kind: "registry_pb2.NodeKind.ValueType") -> Unavailable:
    """Nobody serves what is asked for."""
    command = registry_pb2.NodeKind.Name(kind).lower()
    return Unavailable(
        f"the cluster has no {_TITLES[kind]} that is up: `eldric-cli {command}` runs one, and `eldric-cli up` what is "
        "missing of a local cluster"
    )


class Connections:
    """Channels of one client, kept over calls. What failed is looked for anew at the next call."""

    def __init__(self, cluster: Cluster, timeout_s: float) -> None:
        self._addresses = cluster.controllers
        self.timeout_s = timeout_s
        identity = cluster.identity()
        self._channels = ChannelPool(lambda: identity)
        self._controller = ""
        self._nodes: dict[int, tuple[float, list[registry_pb2.Node]]] = {}
        self._turn = 0

    async def close(self) -> None:
        await self._channels.close()

    @contextlib.contextmanager
    def calling(self, peer: str) -> Iterator[None]:
        """Turns grpc.RpcError into the EldricError that the peer raised, and forgets who was there when it is gone."""
        try:
            with call_errors(peer):
                yield
        except Unavailable:
            self._controller = ""
            self._nodes.clear()
            raise

    def to(self, address: str, kind: str, name: str) -> grpc.aio.Channel:
        """To any node of the cluster."""
        return self._channels.to(address, kind, name)

    async def controller(self) -> grpc.aio.Channel:
        """To the controller that answered last, or to the first that answers. Raises Unavailable."""
        if len(self._addresses) == 1:
            return self._channels.to(self._addresses[0], "controller")
        if self._controller:
            return self._channels.to(self._controller, "controller")
        for address in self._addresses:
            channel = self._channels.to(address, "controller")
            request = registry_pb2.ListNodesRequest(kind=registry_pb2.CONTROLLER)
            with contextlib.suppress(grpc.RpcError):
                await registry_pb2_grpc.RegistryStub(channel).List(request, timeout=_PROBE_S)
                self._controller = address
                return channel
        raise Unavailable(f"no controller answers at {', '.join(self._addresses)}")

    async def nodes(
        self, kind: "registry_pb2.NodeKind.ValueType" = registry_pb2.NODE_KIND_UNSPECIFIED
    ) -> list[registry_pb2.Node]:
        """The nodes that the controller knows now."""
        stub = registry_pb2_grpc.RegistryStub(await self.controller())
        with self.calling("the controller"):
            answer = await stub.List(registry_pb2.ListNodesRequest(kind=kind), timeout=self.timeout_s)
        return list(answer.nodes)

    async def router(self) -> grpc.aio.Channel:
        """To the routers in turn. Raises Unavailable when none is up."""
        return await self._one_of(registry_pb2.ROUTER)

    async def data_worker(self, *, steady: bool = False) -> grpc.aio.Channel:
        """To the data workers in turn; steady: always to the first by name. Raises Unavailable when none is up."""
        return await self._one_of(registry_pb2.DATA, steady)

    async def _one_of(self, kind: "registry_pb2.NodeKind.ValueType", steady: bool = False) -> grpc.aio.Channel:
        asked_at, found = self._nodes.get(kind, (0.0, []))
        if not found or time.monotonic() - asked_at > _NODES_S:
            found = [node for node in await self.nodes(kind) if node.state == registry_pb2.UP]
            self._nodes[kind] = time.monotonic(), found
        if not found:
            raise none_up(kind)
        self._turn += not steady
        node = min(found, key=lambda each: each.name) if steady else found[self._turn % len(found)]
        return self._channels.to(node.grpc_address, registry_pb2.NodeKind.Name(kind).lower(), node.name)
