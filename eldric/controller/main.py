"""A controller process: its node, the cluster's state, and the watch over the other nodes."""

import os
import time
from typing import Any

from eldric import PROTOCOL, __version__
from eldric.controller.caretaker import Caretaker
from eldric.controller.cluster import Chore, Cluster
from eldric.controller.config import ControllerConfig
from eldric.controller.deployer import Deployer
from eldric.controller.deployments import PipelineState
from eldric.controller.fresh import FreshReports
from eldric.controller.heartbeat_service import HeartbeatService
from eldric.controller.membership_service import MembershipService
from eldric.controller.metrics import ClusterCollector, ControllerMetrics, ReplicationCollector
from eldric.controller.models import Models
from eldric.controller.nodes import NodeInfo, NodeState
from eldric.controller.pipeline_service import PipelineService
from eldric.controller.planning import Planning
from eldric.controller.registry_service import RegistryService
from eldric.controller.releases import Releases
from eldric.controller.replication_service import ReplicationService
from eldric.controller.replicator import Replicator
from eldric.controller.ring import RingMaker
from eldric.controller.state import Store
from eldric.controller.workers import Workers
from eldric.node import Node
from eldric.security import Authority, Identity
from eldric.v1 import (
    heartbeat_pb2,
    heartbeat_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    pipeline_pb2,
    pipeline_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    replication_pb2,
    replication_pb2_grpc,
)

#: In the controller's folder.
STATE_FILE = "state.db"
AUTHORITY_FOLDER = "authority"

#: Ticks in a beat interval.
_TICKS = 4


class Controller:
    """Wires a controller's parts together. Use `open`."""

    def __init__(self, config: ControllerConfig, identity: Identity, authority: Authority, store: Store) -> None:
        self.node = Node(config.node, identity, authority)
        self.cluster = Cluster(config, self._perform)
        metrics = ControllerMetrics(self.node.metrics)
        self.node.metrics.register(ClusterCollector(self.cluster))
        workers = Workers(config, self.node.channels, lambda: self.node.identity)
        rings = RingMaker(self.cluster, workers)
        models = Models(config, self.cluster, self.node.channels)
        planning = Planning(self.cluster, models)
        self._config = config
        self._store = store
        self._deployer = Deployer(self.cluster, store, planning, rings, metrics)
        tick_s = config.beat_interval_ms / 1000 / _TICKS
        self._caretaker = Caretaker(self.cluster, workers, rings, self._deployer, metrics, tick_s)
        self._replicator = Replicator(config, self.cluster, store, models, self.node.channels)
        self.node.metrics.register(ReplicationCollector(self._replicator.statuses))
        self._releases = Releases(self.cluster, models, self._deployer)
        self._serve(authority, metrics, FreshReports(self.cluster, workers))
        self.node.health(self._look)
        self.node.on_start(self._start)
        self.node.on_drain(self._deployer.close)
        self.node.on_stop(self.close)

    @classmethod
    async def open(cls, config: ControllerConfig, identity: Identity) -> "Controller":
        """A controller with what it kept. Raises NotFound without an authority, DataLoss, NotReady."""
        folder = config.node.folder
        authority = Authority.load(folder / AUTHORITY_FOLDER)
        store = await Store.open(folder / STATE_FILE)
        try:
            controller = cls(config, identity, authority, store)
            controller.node.expelled.replace(await store.expelled())
            await controller._replicator.open()
            await controller._deployer.recover(time.monotonic() + config.settle_ms / 1000)
        except BaseException:
            await store.close()
            raise
        return controller

    def _serve(self, authority: Authority, metrics: ControllerMetrics, fresh: FreshReports) -> None:
        node, cluster = self.node, self.cluster
        node.service(
            RegistryService(self._config, cluster),
            registry_pb2_grpc.add_RegistryServicer_to_server,
            registry_pb2.DESCRIPTOR.services_by_name["Registry"],
        )
        node.service(
            HeartbeatService(cluster, metrics, node.expelled),
            heartbeat_pb2_grpc.add_HeartbeatServicer_to_server,
            heartbeat_pb2.DESCRIPTOR.services_by_name["Heartbeat"],
        )
        node.service(
            PipelineService(cluster, self._deployer, fresh),
            pipeline_pb2_grpc.add_PipelineServicer_to_server,
            pipeline_pb2.DESCRIPTOR.services_by_name["Pipeline"],
        )
        node.service(
            ReplicationService(self._replicator, self._releases),
            replication_pb2_grpc.add_ReplicationServicer_to_server,
            replication_pb2.DESCRIPTOR.services_by_name["Replication"],
        )
        node.service(
            MembershipService(authority, self._store, cluster, node.expelled),
            membership_pb2_grpc.add_MembershipServicer_to_server,
            membership_pb2.DESCRIPTOR.services_by_name["Membership"],
            strangers=True,
        )

    def _perform(self, chore: Chore) -> None:
        self._caretaker.perform(chore)

    def _look(self) -> tuple[bool, dict[str, Any]]:
        """For /health."""
        alive = [node for node in self.cluster.nodes() if node.state is not NodeState.LOST]
        ready = [each for each in self.cluster.deployments if each.state is PipelineState.READY]
        pipelines = len(list(self.cluster.deployments))
        return True, {"nodes": len(alive), "pipelines": pipelines, "ready_pipelines": len(ready)}

    async def _start(self) -> None:
        node = self.node
        self.cluster.register(
            NodeInfo(
                kind="controller",
                name=node.config.name,
                grpc_address=node.grpc_address,
                http_url=node.http_url,
                version=__version__,
                protocol=PROTOCOL,
                pid=os.getpid(),
                incarnation=node.incarnation,
                join_address=node.join_address,
            ),
            permanent=True,
        )
        self._caretaker.start()
        self._replicator.start()

    async def close(self) -> None:
        """Ends what goes on in the background and closes the state."""
        await self._replicator.close()
        await self._caretaker.close()
        await self._store.close()


async def run(config: ControllerConfig) -> None:
    """Serves until a signal ends the process."""
    controller = await Controller.open(config, Identity.load(config.node.folder))
    try:
        await controller.node.run()
    finally:
        await controller.close()
