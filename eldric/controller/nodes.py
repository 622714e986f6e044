"""What the controller knows of a node, as values."""

from dataclasses import dataclass, field
from enum import StrEnum

from eldric.v1 import stage_pb2


class NodeState(StrEnum):
    """Whether a node is there; see the message NodeState."""

    UP = "up"
    DRAINING = "draining"
    SUSPECT = "suspect"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    description: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What a worker gives; see the message Resources."""

    cores: int
    memory_bytes: int
    devices: tuple[Device, ...] = ()
    engine: str = ""
    cpu_variant: str = ""
    transports: tuple[str, ...] = ()
    host: str = ""
    device: str = ""  # of `devices`, the one that stages are computed on


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a node says of itself when it registers."""

    kind: str
    name: str
    grpc_address: str
    http_url: str
    version: str
    protocol: int
    pid: int
    incarnation: int
    resources: Resources | None = None
    edge_id: str = ""  # of the edge whose addresses these are
    join_address: str = ""  # controllers and edges: where a node without a certificate joins

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


class StageState(StrEnum):
    """What a worker says of a stage; see the message StageState."""

    LOADING = "loading"
    LOADED = "loaded"
    SERVING = "serving"
    BROKEN = "broken"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class StageKey:
    """A stage that some worker holds: `epoch` tells apart the stages of before and after a rebalance."""

    pipeline_id: str
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that a stage holds, in bytes."""

    mapped: int = 0
    repacked: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return self.mapped + self.repacked + self.kv + self.compute


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a stage listens for frames; see the message TensorEndpoint."""

    scheme: str
    address: str
    public_key: str


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage, as its worker reports it."""

    key: StageKey
    state: StageState
    message: str = ""
    memory: Memory = field(default_factory=Memory)
    step_ms: float = 0.0
    steps: int = 0
    slots_used: int = 0
    queued: int = 0
    endpoint: Endpoint | None = None
    round: int = 0  # of its last Connect
    sender_scheme: str = ""
    sender_key: str = ""
    link: stage_pb2.LinkStatus | None = None  # passed through as it is
