"""eldric-cli controller|worker|data|router: one node in the foreground, on a real machine or below `up`."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from eldric.config import DEFAULT_PORT, NodeConfig
from eldric.errors import InvalidRequest

app = typer.Typer()

Folder = Annotated[
    Path, typer.Option("--folder", help="The node's own folder: certificate, state and log. `join` makes it.")
]
Controllers = Annotated[
    list[str], typer.Option("--controller", metavar="HOST:PORT", help="A controller's gRPC address; may be repeated.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Advertise = Annotated[str | None, typer.Option("--advertise", help="Host by which other nodes reach this one.")]
HttpPort = Annotated[
    int, typer.Option("--http-port", help="0 picks a free one; -1 is the kind's own.", show_default="the kind's own")
]
GrpcPort = Annotated[int, typer.Option("--grpc-port", help="Default: the HTTP port + 1000.", show_default=False)]
LogLevel = Annotated[str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")]
InsecureHttp = Annotated[
    bool, typer.Option("--insecure-http", help="Serve plain HTTP on an address that other machines reach.")
]


@app.command()
def controller(
    folder: Folder,
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = DEFAULT_PORT,
    grpc_port: GrpcPort = DEFAULT_PORT,
    join_port: Annotated[int, typer.Option("--join-port", help="Default: the HTTP port + 2000.")] = DEFAULT_PORT,
    log_level: LogLevel = "INFO",
) -> None:
    """Run a controller: the registry, the planner and the deployments of a cluster."""
    from eldric.controller.config import ControllerConfig
    from eldric.controller.main import run

    node = _node("controller", folder, host, advertise, http_port, grpc_port, (), log_level, join_port=join_port)
    _serve(node, run(ControllerConfig(node)))


@app.command()
def worker(
    folder: Folder,
    controllers: Controllers,
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = DEFAULT_PORT,
    grpc_port: GrpcPort = DEFAULT_PORT,
    models: Annotated[
        Path | None, typer.Option("--models", help="Where the model store is mounted. Default: the store's own path.")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory for stages, such as 24GB or 16GiB. Default: the machine's.")
    ] = "",
    threads: Annotated[int, typer.Option("--threads", help="Compute threads of a stage. 0: all cores.")] = 0,
    cpus: Annotated[str, typer.Option("--cpus", help="Cores to pin compute threads to, such as 0,2-5.")] = "",
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait for a slot, per pipeline.")] = 128,
    allow_insecure_tensors: Annotated[
        bool, typer.Option("--allow-insecure-tensors", help="Let a deployment ask for unencrypted tensor channels.")
    ] = False,
    log_level: LogLevel = "INFO",
) -> None:
    """Run a worker: it holds stages of pipelines and computes them."""
    from eldric.worker.config import WorkerConfig
    from eldric.worker.main import run

    node = _node("worker", folder, host, advertise, http_port, grpc_port, controllers, log_level)
    config = WorkerConfig(
        node=node,
        models=models,
        memory_bytes=parse_bytes(memory) if memory else 0,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        queue=queue,
        allow_insecure_tensors=allow_insecure_tensors,
    )
    _serve(node, run(config))


@app.command()
def data(
    folder: Folder,
    controllers: Controllers,
    models: Annotated[Path, typer.Option("--models", help="The model store's folder.")],
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = DEFAULT_PORT,
    grpc_port: GrpcPort = DEFAULT_PORT,
    log_level: LogLevel = "INFO",
) -> None:
    """Run a data worker: the model store."""
    from eldric.data.config import DataConfig
    from eldric.data.main import run

    node = _node("data", folder, host, advertise, http_port, grpc_port, controllers, log_level)
    _serve(node, run(DataConfig(node, models)))


@app.command()
def router(
    folder: Folder,
    controllers: Controllers,
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = DEFAULT_PORT,
    grpc_port: GrpcPort = DEFAULT_PORT,
    insecure_http: InsecureHttp = False,
    log_level: LogLevel = "INFO",
) -> None:
    """Run a router: the OpenAI-compatible API."""
    from eldric.router.config import RouterConfig
    from eldric.router.main import run

    node = _node(
        "router", folder, host, advertise, http_port, grpc_port, controllers, log_level, insecure_http=insecure_http
    )
    _serve(node, run(RouterConfig(node)))


def _node(
    kind: str,
    folder: Path,
    host: str,
    advertise: str | None,
    http_port: int,
    grpc_port: int,
    controllers: list[str] | tuple[str, ...],
    log_level: str,
    **more: Any,
) -> NodeConfig:
    """The settings that all kinds share. The node's name is its certificate's."""
    from eldric.security import Identity

    return NodeConfig(
        kind=kind,
        name=Identity.load(folder).name,
        folder=folder,
        host=host,
        advertise=advertise,
        http_port=http_port,
        grpc_port=grpc_port,
        controllers=tuple(controllers),
        log_level=log_level,
        **more,
    )


def _serve(node: NodeConfig, work: Coroutine[Any, Any, None]) -> None:
    from eldric import logs

    logs.set_up(node)
    asyncio.run(work)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """ "24GB", "16GiB", "500M" or a plain number. Raises InvalidRequest."""
    compact = text.strip().lower().removesuffix("b")
    digits = compact.rstrip("kmgti")
    unit = compact[len(digits) :]
    try:
        size = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InvalidRequest(f"{text!r} is no amount of memory; write for example 24GB or 16GiB") from None
    if size <= 0:
        raise InvalidRequest(f"{text!r} is no amount of memory: it must be more than 0")
    return size


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0,2-5" as numbers. Raises InvalidRequest."""
    cpus: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        raise InvalidRequest(f"{text!r} is no list of cores; write for example 0,2-5") from None
    if not cpus:
        raise InvalidRequest(f"{text!r} names no core")
    return tuple(cpus)
