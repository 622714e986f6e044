"""Settings of an edge."""

from dataclasses import dataclass, field

from eldric.config import NodeConfig
from eldric.errors import InvalidRequest
from eldric.tunnel.limits import TunnelLimits, TunnelTimes


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """What an edge gives to nodes behind NAT."""

    node: NodeConfig
    ports: tuple[int, int] | None = None  # first and last port for nodes to be reached by; None: any free ones
    tunnels: int = 64  # nodes at once
    joiners: int = 32  # connections to the join port at once
    limits: TunnelLimits = field(default_factory=TunnelLimits)
    times: TunnelTimes = field(default_factory=TunnelTimes)

    def __post_init__(self) -> None:
        if self.ports is not None and not 0 < self.ports[0] <= self.ports[1] <= 65535:
            raise InvalidRequest(f"ports {self.ports[0]} to {self.ports[1]}: write FIRST-LAST, from 1 to 65535")


def parse_ports(text: str) -> tuple[int, int]:
    """First and last of "20000-20099". Raises InvalidRequest."""
    first, dash, last = text.partition("-")
    if not (dash and first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise InvalidRequest(f"{text!r} are no ports: write FIRST-LAST, such as 20000-20099")
    return int(first), int(last)
