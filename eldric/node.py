"""What every node shares: its servers, the cluster's certificates, health, metrics and an orderly end."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from eldric.channels import ChannelPool
from eldric.config import NodeConfig
from eldric.security import Authority, Identity

HealthCheck = Callable[[], tuple[bool, dict[str, Any]]]
Callback = Callable[[], Awaitable[None]]


class Node:
    """One node's servers. Register services, routes and callbacks, then `run`."""

    def __init__(self, config: NodeConfig, identity: Identity, authority: Authority | None = None) -> None:
        """`authority`: for a controller that issues certificates, its own included."""
        self.config = config
        self.identity = identity
        self.incarnation = 0
        self.grpc_address = ""
        self.http_url = ""
        self.join_address = ""
        self.draining = False
        self.metrics = CollectorRegistry()
        #: Connections to other nodes with this node's current certificate.
        self.channels = ChannelPool(lambda: self.identity)

    def service(
        self,
        servicer: Any,
        adder: Callable[[Any, Any], None],
        descriptor: ServiceDescriptor,
        *,
        strangers: bool = False,
    ) -> None:
        """Serves `servicer` over gRPC, and over REST what its google.api.http options say.

        `strangers`: also on the join port, where callers show no certificate.
        """
        raise NotImplementedError

    def routes(self, routes: Sequence[BaseRoute]) -> None:
        """Adds HTTP routes; they come before the REST faces."""
        raise NotImplementedError

    def health(self, check: HealthCheck) -> None:
        """`check` says whether the node is ready, and details for /health. All checks must be."""
        raise NotImplementedError

    def on_start(self, callback: Callback) -> None:
        """`callback` runs when both servers listen, before `start` returns."""
        raise NotImplementedError

    def on_drain(self, callback: Callback) -> None:
        """`callback` runs when the node was asked to end, in order, while the servers still answer."""
        raise NotImplementedError

    def on_stop(self, callback: Callback) -> None:
        """`callback` runs after all drain callbacks, the last one added first, before the servers stop."""
        raise NotImplementedError

    async def start(self) -> None:
        """Binds the servers, writes node.json, runs the start callbacks. Raises AddressInUse."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Drains within `config.drain_s`, stops the servers, removes node.json."""
        raise NotImplementedError

    async def run(self) -> None:
        """Starts, waits for SIGTERM, SIGINT or `end`, then stops. A second signal ends the process at once."""
        raise NotImplementedError

    def end(self) -> None:
        """Asks the node to end, as SIGTERM does."""
        raise NotImplementedError
