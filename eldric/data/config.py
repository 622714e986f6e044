"""Settings of a data worker."""

from dataclasses import dataclass
from pathlib import Path

from eldric.config import NodeConfig
from eldric.errors import InvalidRequest
from eldric.nfs.address import NfsAddress


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the models lie, and how much is done at once."""

    node: NodeConfig
    folder: Path  # the model store, which other machines may mount
    nfs: NfsAddress | None = None  # from where; None: from where `data export` says, while it runs
    jobs: int = 2  # imports and checks that run at once
    queue: int = 16  # imports and checks that may wait
    transfers: int = 16  # answers with a model's bytes that are sent at once over HTTP
    waiting_transfers: int = 64  # and those that may wait; more are told to come again
    hub: str = ""  # "https://host" of a hub; empty: what HF_ENDPOINT says, else Hugging Face
    ollama: Path | None = None  # an Ollama store; None: where Ollama usually keeps it

    def __post_init__(self) -> None:
        if self.jobs < 1 or self.queue < 0:
            raise InvalidRequest(f"jobs is {self.jobs} and queue is {self.queue}: at least 1 and 0")
        if self.transfers < 1 or self.waiting_transfers < 0:
            raise InvalidRequest(f"{self.transfers} transfers and {self.waiting_transfers} waiting: at least 1 and 0")
