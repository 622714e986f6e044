"""Settings of a worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eldric.config import NodeConfig

#: Where a worker reads model files: below its mount, from data workers over HTTP, or wherever the very same file is.
ModelsFrom = Literal["mount", "http", "auto"]

#: The graphics device, where the compute library finds one, else the CPU.
AUTO = "auto"

#: Whether mapped weights are locked in memory, as far as the limit allows. auto: those on mounts that may hang.
LockWeights = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker gives to the cluster."""

    node: NodeConfig
    models: ModelsFrom = "auto"  # auto: the mount if it has the very same file, else HTTP
    models_dir: Path | None = None  # where the model store's folder is mounted here; None: the data worker's own path
    cache_dir: Path | None = None  # of what came over HTTP; workers of one machine may share it. None: node/cache
    cache_bytes: int = 0  # most bytes of it; 0: nine tenths of what the disk has free beside it
    lock: LockWeights = "auto"
    device: str = AUTO  # what stages are computed on, as ggml names it: CPU, CUDA0, Metal, Vulkan0
    memory_bytes: int = 0  # memory for stages in all; 0: memory_share of what the device has
    memory_share: float = 1.0  # of the machine's memory (or its control group's), or of a graphics device's own
    threads: int = 0  # compute threads of a stage that does not say; 0: the machine's cores
    cpus: tuple[int, ...] | None = None  # cores to pin compute threads to; None: the operating system decides
    queue: int = 128  # generations that may wait for a slot, for each head
    silence_s: float = 3.0  # a neighbour that is silent for longer is lost
    allow_insecure_tensors: bool = False  # whether a deployment may ask for tensor channels without encryption
    trust_fabric: bool = False  # whether transports that have no encryption, such as ucx, may be used at all

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or self.node.folder / "cache"
