"""The gRPC servers of a node: one with mutual TLS, and for controllers one where strangers may join."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from eldric.channels import MAX_MESSAGE_BYTES, UNCOMPRESSED
from eldric.config import NodeConfig
from eldric.errors import AddressInUse
from eldric.interceptors import CallGuard, CallInterceptor
from eldric.names import join_address
from eldric.readiness import Readiness
from eldric.security.live import LiveIdentity
from eldric.web import check_free

#: Calls that a node answers at once; more are refused with RESOURCE_EXHAUSTED.
MAX_CALLS = 4096

#: Longest time for a connection to show its certificate and to begin with HTTP/2, in seconds.
HANDSHAKE_S = 10.0
#: On the join port, which strangers may use: calls and connections at once, and the longest life of a connection.
JOIN_CALLS, JOIN_CONNECTIONS, JOIN_LIFE_S = 64, 128, 60.0

_OPTIONS: list[tuple[str, Any]] = [
    *UNCOMPRESSED,
    ("grpc.per_message_decompression", 0),  # nor is one unpacked that comes before its call is refused
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # of a keepalive as well: gRPC alone would wait for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),  # two nodes must not share a port unknowingly
]


def _options(*, for_strangers: bool) -> list[tuple[str, Any]]:
    options = [*_OPTIONS, ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1000))]
    if for_strangers:
        options += [
            ("grpc.max_receive_message_length", 64 * 1024),
            ("grpc.max_concurrent_streams", JOIN_CALLS),
            ("grpc.max_allowed_incoming_connections", JOIN_CONNECTIONS),
            ("grpc.max_connection_age_ms", round(JOIN_LIFE_S * 1000)),
            ("grpc.max_connection_age_grace_ms", round(HANDSHAKE_S * 1000)),
        ]
    return options


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer, how it is added to a server, and its descriptor. `strangers`: also on the join port."""

    servicer: Any
    adder: Callable[[Any, Any], None]
    descriptor: ServiceDescriptor
    strangers: bool = False


class GrpcServer:
    """Health, reflection and a node's services."""

    def __init__(
        self,
        config: NodeConfig,
        live: LiveIdentity,
        guard: CallGuard,
        readiness: Readiness,
        services: Sequence[Service],
    ) -> None:
        self._config = config
        self._live = live
        self._guard = guard
        self._readiness = readiness
        self._services = services
        self._servers: list[grpc.aio.Server] = []

    async def start(self) -> tuple[str, str]:
        """Listens. Returns the address that others reach, and that of the join port ("" when nothing is open to
        strangers). Raises AddressInUse."""
        main = self._server(for_strangers=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._readiness.servicer, main)
        names = [each.descriptor.full_name for each in self._services]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], main)
        for each in self._services:
            each.adder(each.servicer, main)
        port = self._bind(main, self._config.grpc_port, "--grpc-port", require_client=True)
        await main.start()
        strangers = [each for each in self._services if each.strangers]
        if not strangers:
            return self._config.advertised(port), ""
        join = self._server(for_strangers=True)
        for each in strangers:
            each.adder(each.servicer, join)
        join_port = self._bind(join, self._config.join_port, "--join-port", require_client=False)
        await join.start()
        return self._config.advertised(port), self._config.advertised(join_port)

    def _server(self, *, for_strangers: bool) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(self._guard)],
            options=_options(for_strangers=for_strangers),
            maximum_concurrent_rpcs=JOIN_CALLS if for_strangers else MAX_CALLS,
        )
        self._servers.append(server)
        return server

    def _bind(self, server: grpc.aio.Server, port: int, option: str, *, require_client: bool) -> int:
        check_free(self._config.host, port, option)
        address = join_address(self._config.host, port)
        try:
            return server.add_secure_port(address, self._live.grpc_credentials(require_client=require_client))
        except RuntimeError:
            raise AddressInUse(f"cannot listen on {address}: choose another port with {option}") from None

    async def stop(self, grace_s: float) -> None:
        """Takes no new call, gives those that run `grace_s` seconds, then cancels them."""
        for server in self._servers:
            await server.stop(grace_s)
        self._servers.clear()
