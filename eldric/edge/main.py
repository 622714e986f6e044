"""An edge process: its node, its tunnels and its membership."""

from eldric.edge.config import EdgeConfig
from eldric.edge.join_door import JoinDoor
from eldric.edge.metrics import EdgeMetrics
from eldric.edge.service import TunnelService
from eldric.edge.targets import Targets
from eldric.member import Member
from eldric.node import Node
from eldric.security import Identity
from eldric.v1 import tunnel_pb2, tunnel_pb2_grpc


class Edge:
    """Wires an edge's parts together. It holds nothing that it cannot lose."""

    def __init__(self, config: EdgeConfig) -> None:
        self.node = Node(config.node, Identity.load(config.node.folder))
        metrics = EdgeMetrics(self.node.metrics)
        self.targets = Targets(self.node)
        self.tunnels = TunnelService(config, self.targets, metrics)
        self.node.metrics.register(self.tunnels)
        self.node.service(
            self.tunnels,
            tunnel_pb2_grpc.add_TunnelServicer_to_server,
            tunnel_pb2.DESCRIPTOR.services_by_name["Tunnel"],
        )
        self.door = JoinDoor(config.node, self.targets.join, config.joiners, metrics.refused.labels("joiner"))
        self.member = Member(self.node)
        self.node.health(self.tunnels.look)
        self.node.on_start(self.targets.start)
        self.node.on_start(self._open_door)
        self.node.on_stop(self.tunnels.close)
        self.node.on_stop(self.door.stop)
        self.node.on_stop(self.targets.stop)

    async def _open_door(self) -> None:
        await self.door.start()
        self.node.join_address = self.door.address
        self.node.write_down()


async def run(config: EdgeConfig) -> None:
    """Serve until a signal ends the process."""
    await Edge(config).node.run()
