"""Registry: which nodes there are."""

from collections.abc import AsyncIterator

from eldric import PROTOCOL
from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.config import ControllerConfig
from eldric.v1 import registry_pb2, registry_pb2_grpc


class RegistryService(registry_pb2_grpc.RegistryServicer):
    def __init__(self, config: ControllerConfig, cluster: Cluster) -> None:
        self._config = config
        self._cluster = cluster

    async def Register(self, request: registry_pb2.RegisterRequest, context: object) -> registry_pb2.RegisterResponse:
        info = convert.node_info(request.node)
        self._cluster.register(info)
        return registry_pb2.RegisterResponse(
            beat_interval_ms=self._config.beat_interval_ms,
            lease_ms=round(self._cluster.registry.lease_s(info) * 1000),
            protocol=PROTOCOL,
        )

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: object
    ) -> registry_pb2.DeregisterResponse:
        self._cluster.deregister(request.node_id)
        return registry_pb2.DeregisterResponse()

    async def List(self, request: registry_pb2.ListNodesRequest, context: object) -> registry_pb2.ListNodesResponse:
        nodes = self._cluster.nodes(_kind(request.kind))
        return registry_pb2.ListNodesResponse(nodes=[convert.node_message(node) for node in nodes])

    async def Watch(
        self, request: registry_pb2.WatchNodesRequest, context: object
    ) -> AsyncIterator[registry_pb2.NodeEvent]:
        kind = _kind(request.kind)
        now = [registry_pb2.NodeEvent(node=convert.node_message(node)) for node in self._cluster.nodes(kind)]
        with self._cluster.node_news.watch(now) as watcher:
            async for event in watcher.follow():
                if request.kind in (registry_pb2.NODE_KIND_UNSPECIFIED, event.node.kind):
                    yield event


def _kind(kind: "registry_pb2.NodeKind.ValueType") -> str:
    return convert.kind_name(kind) if kind else ""
