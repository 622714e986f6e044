"""Settings of a worker."""

from dataclasses import dataclass
from pathlib import Path

from eldric.config import NodeConfig


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker gives to the cluster."""

    node: NodeConfig
    models: Path | None = None  # where the model store's folder is mounted here; None: the data worker's own path
    memory_bytes: int = 0  # memory for stages in all; 0: what the machine (or its control group) has
    threads: int = 0  # compute threads of a stage that does not say; 0: the machine's cores
    cpus: tuple[int, ...] | None = None  # cores to pin compute threads to; None: the operating system decides
    queue: int = 128  # generations that may wait for a slot, for each head
    silence_s: float = 3.0  # a neighbour that is silent for longer is lost
    allow_insecure_tensors: bool = False  # whether a deployment may ask for tensor channels without encryption
