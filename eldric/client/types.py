"""What the client gives back: typed and frozen, with sizes in bytes and times in milliseconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    pid: int
    state: str
    device: str  # that stages are computed on
    devices: tuple[str, ...]  # all that the worker has
    memory_bytes: int
    memory_used_bytes: int
    cores: int
    engine: str
    address: str


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Any node: kind is "controller", "worker", "data", "router" or "edge"."""

    name: str
    kind: str
    state: str
    pid: int
    grpc_address: str
    http_url: str
    version: str
    protocol: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """A stage's link to the next one. Counters are since the link was made."""

    to_stage: int
    transport: str
    encryption: str  # "curve", "tls", "host" (frames do not leave the machine), "none"
    round_trip_ms: float  # 0: not known
    frames: int
    bytes: int
    queue_frames: int  # sent and not yet taken by the next stage
    queue_bytes: int
    fallback: str  # why it is not of a better transport
    closed: str  # why nothing can be sent any more


@dataclass(frozen=True, slots=True)
class StageInfo:
    index: int
    worker: str
    pid: int
    layers: tuple[int, int]  # half-open
    state: str
    memory_bytes: int
    memory: Mapping[str, int]  # mapped, repacked, kv, compute
    step_ms: float
    steps: int
    transport: str
    encrypted: bool
    message: str
    link: LinkInfo | None = None


@dataclass(frozen=True, slots=True)
class PipelineInfo:
    name: str
    id: str
    model: str
    state: str  # "deploying", "ready", "degraded", "undeploying"
    epoch: int
    stages: tuple[StageInfo, ...]
    context: int
    slots: int
    slots_used: int
    queued: int
    progress: float
    message: str
    options: Mapping[str, int | str | bool]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    index: int
    worker: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    available_bytes: int
    transports: tuple[str, ...] = ()  # that the link to the next stage may go by, best first


@dataclass(frozen=True, slots=True)
class Plan:
    model: str
    stages: tuple[PlannedStage, ...]
    excluded: Mapping[str, str]  # worker -> why it was left out


@dataclass(frozen=True, slots=True)
class StageProgress:
    index: int
    worker: str
    phase: str
    done_bytes: int
    total_bytes: int


DeployEvent = Plan | StageProgress | PipelineInfo


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    layers: int
    size_bytes: int
    format: str
    architecture: str
    quantization: str
    parameters: int
    context: int
    problem: str = ""  # why it cannot be deployed
    copies: int = 0  # data workers that hold it; 0: not asked
    copies_wanted: int = 0  # data workers that should hold it; 0: nothing is set


@dataclass(frozen=True, slots=True)
class ModelDetails:
    info: ModelInfo
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    tensor_count: int
    folder: str  # the store's, as the data worker sees it
    files: tuple[tuple[str, int], ...]  # path below the folder, size in bytes
    sha256: tuple[str, ...]
    header: Mapping[str, str]
    origin: str = ""  # path or source that it was imported from
    data_workers: tuple[str, ...] = ()  # names of those that hold it
    replication: str = ""  # what is done about copies that are missing, or what hinders it


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """How far a copy of a model to a data worker is."""

    data_worker: str
    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReplicas:
    """Who holds a model: names of data workers."""

    model: str
    data_workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImportProgress:
    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """What a source of models turned out to be. kept_bytes: what an earlier try had brought already."""

    source: str  # in full
    name: str  # in the store
    quantization: str
    files: tuple[tuple[str, int], ...]  # name at the source, size in bytes
    size_bytes: int
    kept_bytes: int
    problem: str = ""  # why it will not be deployable, as far as the source tells


PullEvent = ResolvedSource | ImportProgress | ModelInfo


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; `logprob` and `top` (id, logprob) are there when logprobs were asked for."""

    id: int
    text: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    request_id: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that may be shown, and the tokens behind it."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    reason: Finish
    prompt_tokens: int
    completion_tokens: int
    queue_ms: float
    prompt_ms: float
    generation_ms: float
    stop: str = ""
    cached_tokens: int = 0  # of the prompt, that were computed before: for a prompt that began alike


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as a vector of length 1."""

    vector: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole generation."""

    text: str
    tokens: tuple[Token, ...]
    finished: Finished
