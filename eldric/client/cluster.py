"""Which cluster a client speaks to, and as whom.

Looked for in this order: what the caller names; ELDRIC_DIR, the folder of a local cluster; ELDRIC_CONTROLLER, an
address, with the operator's certificate from the context; the context file that `eldric-cli init` and `join` write.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from platformdirs import user_config_path

from eldric.errors import InvalidRequest, NotFound
from eldric.names import split_address
from eldric.security import Identity

#: In a cluster's folder, and as the user's context: where the controllers are.
CLUSTER_FILE = "cluster.json"
CONTEXT_FILE = "context.json"
#: The operator's certificate, beside the file.
OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Addresses of the controllers' gRPC servers, and the folder of the operator's certificate."""

    controllers: tuple[str, ...]
    operator: Path
    folder: Path | None = None  # of a local cluster

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read cluster.json or context.json. Raises NotFound, InvalidRequest."""
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            raise NotFound(f"{path.parent} holds no cluster: there is no {path.name}") from None
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{path} cannot be read: {error}") from error
        controllers = document.get("controllers") if isinstance(document, dict) else None
        if not isinstance(controllers, list) or not controllers or not all(isinstance(c, str) for c in controllers):
            raise InvalidRequest(f"{path} names no controllers")
        folder = path.parent if path.name == CLUSTER_FILE else None
        return cls(tuple(controllers), path.parent / OPERATOR, folder)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"controllers": list(self.controllers)}, indent=2) + "\n")
        partial.replace(path)

    def identity(self) -> Identity:
        """Raises NotFound when there is no operator's certificate."""
        return Identity.load(self.operator)


def context_path() -> Path:
    return user_config_path("eldric") / CONTEXT_FILE


def find_cluster(
    folder: Path | str | None = None,
    controller: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster:
    """The cluster that is meant. Raises NotFound when none is named and no context is set."""
    if folder is not None:
        return Cluster.load(Path(folder) / CLUSTER_FILE)
    if controller is None and (named := environment.get("ELDRIC_DIR")):
        return Cluster.load(Path(named) / CLUSTER_FILE)
    controller = controller or environment.get("ELDRIC_CONTROLLER")
    if controller:
        addresses = tuple(part.strip() for part in controller.split(","))
        for address in addresses:
            split_address(address)
        return Cluster(addresses, context_path().parent / OPERATOR)
    if context_path().exists():
        return Cluster.load(context_path())
    raise NotFound(
        "no cluster is named: start one with `eldric-cli up`, or set ELDRIC_DIR or ELDRIC_CONTROLLER, or use --dir"
    )
