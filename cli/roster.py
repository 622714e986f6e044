"""Which nodes a local cluster has, and with which arguments each is started."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from eldric.cli.units import parse_memory
from eldric.config import check_origin
from eldric.errors import InvalidRequest

MOST_WORKERS = 64


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node. `arguments` are those of `eldric-cli KIND`, beyond its folder and controllers: options and values in
    turn, and flags at the end."""

    kind: str
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its folder, below the cluster's."""
        return self.name if self.kind in ("worker", "data") else self.kind

    def option(self, name: str) -> str | None:
        """The value of an option, if it is given."""
        return self.arguments[self.arguments.index(name) + 1] if name in self.arguments else None

    def with_options(self, options: dict[str, str]) -> "NodeEntry":
        """The same node with these options in place of what was given of them."""
        kept: list[str] = []
        pairs = iter(self.arguments)
        for argument in pairs:
            if argument in options:
                next(pairs, None)
            else:
                kept.append(argument)
        return NodeEntry(self.kind, self.name, (*(part for each in options.items() for part in each), *kept))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a person says of a cluster."""

    workers: int = 2
    device: str = ""  # of the workers, several separated by commas: they are taken in turn; empty: the worker chooses
    memory: str = ""  # of each worker; empty: the device's, shared evenly
    threads: int = 0  # of each worker; 0: cores / workers
    pin: bool = False  # whether each worker has cores of its own
    router_port: int = 0  # 0: a free one
    allow_origins: tuple[str, ...] = ()  # sites whose web pages may call the router


def roster(folder: Path, shape: Shape, *, cores: int = 0) -> list[NodeEntry]:
    """The nodes of a local cluster in `folder`. cores: the machine's; 0: what it has.

    Raises InvalidRequest.
    """
    if not 1 <= shape.workers <= MOST_WORKERS:
        raise InvalidRequest(f"{shape.workers} workers: 1 to {MOST_WORKERS} run on one machine")
    if shape.threads < 0:
        raise InvalidRequest(f"{shape.threads} threads: at least 1, or 0 for cores / workers")
    cores = cores or psutil.cpu_count() or 1
    devices = [name.strip() for name in shape.device.split(",")]
    if shape.memory:
        parse_memory(shape.memory)
    threads = shape.threads or max(1, cores // shape.workers)
    ports = ("--http-port", "0")
    models = ("--models", str(folder / "models"))
    for origin in shape.allow_origins:
        check_origin(origin)
    origins = [part for origin in shape.allow_origins for part in ("--allow-origin", origin)]
    nodes = [
        NodeEntry("controller", "controller", ports),
        NodeEntry("data", "data", (*ports, *models)),
        NodeEntry("router", "router", ("--http-port", str(shape.router_port), *origins)),
    ]
    for index in range(shape.workers):
        arguments: tuple[str, ...] = (*ports, "--models-dir", models[1])
        device = devices[index % len(devices)]
        sharing = sum(devices[each % len(devices)] == device for each in range(shape.workers))
        memory = shape.memory or f"{100 / sharing:.2f}%"
        arguments = (*arguments, "--memory", memory, "--threads", str(threads))
        if device:
            arguments = (*arguments, "--device", device)
        if shape.pin:
            own = [(index * threads + offset) % cores for offset in range(threads)]
            arguments = (*arguments, "--cpus", ",".join(map(str, dict.fromkeys(own))))
        nodes.append(NodeEntry("worker", f"worker-{index + 1}", arguments))
    return nodes
