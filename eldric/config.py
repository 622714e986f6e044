"""Settings that every node has."""

import re
from dataclasses import dataclass
from pathlib import Path

from eldric.errors import InvalidRequest
from eldric.names import KINDS, check_name, join_address, machine_address, split_address

#: Port of the HTTP face by kind of node; gRPC listens on the port + 1000.
HTTP_PORTS = {"edge": 443, "controller": 8880, "router": 8881, "worker": 8890, "data": 8892}

#: A port that is left to the node's kind.
DEFAULT_PORT = -1

#: How browsers name a site: scheme, host and perhaps a port.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Who a node is and where it listens. Port 0 picks a free port.

    `folder` is the node's own: certificate and key, state, node.json and log.
    `host` is the address to bind; `advertise` is the host that others reach it by (default: `host`, or this
    machine's address where `host` binds all interfaces). `join_port` is used by controllers and edges only: there a
    node without a certificate exchanges a token for one.
    `edge` is the "host:port" of an edge's gRPC face, for a node that others cannot connect to: it has its addresses
    there, and reaches the controllers through it where those in `controllers` do not answer.
    `allow_origins` are sites whose web pages may call a router or an edge, as browsers name them
    ("https://chat.example.org"), or "*" for all.
    """

    kind: str
    name: str
    folder: Path
    host: str = "127.0.0.1"
    advertise: str | None = None
    http_port: int = DEFAULT_PORT
    grpc_port: int = DEFAULT_PORT
    join_port: int = DEFAULT_PORT
    controllers: tuple[str, ...] = ()
    edge: str = ""
    log_level: str = "INFO"
    insecure_http: bool = False
    allow_origins: tuple[str, ...] = ()
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"{self.kind!r} is no kind of node; kinds are {', '.join(KINDS)}")
        check_name(self.name)
        http = HTTP_PORTS[self.kind] if self.http_port == DEFAULT_PORT else self.http_port
        self._settle("http_port", http, http)
        self._settle("grpc_port", self.grpc_port, http + 1000 if http else 0)
        self._settle("join_port", self.join_port, http + 2000 if http else 0)
        if self.kind in ("controller", "edge") and self.edge:
            raise InvalidRequest(f"a {self.kind} must be reached directly: it cannot be behind an edge")
        if self.kind != "controller" and not self.controllers and not self.edge:
            raise InvalidRequest(f"a {self.kind} node needs the address of a controller, or of an edge (host:port)")
        for address in (*self.controllers, *filter(None, [self.edge])):
            split_address(address)
        for origin in self.allow_origins:
            check_origin(origin)
        if self.drain_s < 0:
            raise InvalidRequest(f"drain_s is {self.drain_s}, it must not be negative")

    def _settle(self, field: str, port: int, default: int) -> None:
        port = default if port == DEFAULT_PORT else port
        if not 0 <= port <= 65535:
            raise InvalidRequest(f"{field} is {port}, ports are 0 (picks a free one) to 65535")
        object.__setattr__(self, field, port)

    @property
    def node_id(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def advertised_host(self) -> str:
        """The host by which other nodes reach this one."""
        if self.advertise:
            return self.advertise
        return machine_address() if self.host in ("0.0.0.0", "::", "") else self.host

    def advertised(self, port: int) -> str:
        """ "host:port" by which others reach a port of this node."""
        return join_address(self.advertised_host, port)


def check_origin(origin: str) -> None:
    """Raises InvalidRequest unless a browser could name a site like that."""
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise InvalidRequest(
            f"{origin!r} is no origin: it looks like https://chat.example.org or http://localhost:3000, "
            "in small letters and without a path; * stands for all"
        )
