"""Settings of a router."""

from dataclasses import dataclass
from pathlib import Path

from eldric.config import NodeConfig
from eldric.errors import InvalidRequest

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router takes on."""

    node: NodeConfig
    models: Path | None = None  # where the model store's folder is mounted here; None: the data worker's own path
    max_requests: int = 256  # generations at once, over all models; more are refused with 429
    max_body_bytes: int = 32 * MIB  # of an HTTP request
    max_bodies_bytes: int = 256 * MIB  # of all that are being read; more are refused with 429
    threads: int = 2  # for templates and tokenizing
    vocabularies: int = 16  # models whose tokenizers are kept in memory

    def __post_init__(self) -> None:
        for field in ("max_requests", "max_body_bytes", "max_bodies_bytes", "threads", "vocabularies"):
            if getattr(self, field) < 1:
                raise InvalidRequest(f"{field} is {getattr(self, field)}, it must be at least 1")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise InvalidRequest(f"max_bodies_bytes is {self.max_bodies_bytes}, max_body_bytes {self.max_body_bytes}")
