"""eldric-cli controller|worker|data|router|edge: one node in the foreground, on a real machine or below `up`."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eldric import logs, node_file
from eldric.cli import options
from eldric.cli.export import export
from eldric.cli.options import option
from eldric.cli.units import parse_bytes, parse_cpus, parse_memory
from eldric.config import DEFAULT_PORT, NodeConfig
from eldric.errors import InvalidRequest
from eldric.security import Identity

app = options.new_app()

Folder = Annotated[
    Path,
    option("--folder", metavar="FOLDER", help="The node's own folder: certificate, state and log. `join` makes it."),
]
MaybeFolder = Annotated[
    Path | None,
    option("--folder", metavar="FOLDER", help="The node's own folder: certificate, state and log. `join` makes it."),
]
Controllers = Annotated[
    list[str], option("--controller", metavar="HOST:PORT", help="A controller's gRPC address; may be repeated.")
]
MaybeControllers = Annotated[
    list[str] | None,
    option("--controller", metavar="HOST:PORT", help="A controller's gRPC address; may be repeated."),
]
Edge = Annotated[
    str,
    option(
        "--edge",
        metavar="HOST:PORT",
        help="An edge's gRPC address, for a machine that others cannot connect to: they reach it through the edge.",
    ),
]
Host = Annotated[
    str,
    option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0: all.", default="127.0.0.1"),
]
Advertise = Annotated[
    str | None, option("--advertise", metavar="HOST", help="Host by which other nodes reach this one.")
]
HttpPort = Annotated[
    int | None,
    option("--http-port", metavar="PORT", help="0: a free one.", default="the kind's own", min=0, max=65535),
]
GrpcPort = Annotated[
    int | None,
    option("--grpc-port", metavar="PORT", help="0: a free one.", default="HTTP port + 1000", min=0, max=65535),
]
JoinPort = Annotated[
    int | None,
    option("--join-port", metavar="PORT", help="0: a free one.", default="HTTP port + 2000", min=0, max=65535),
]
LogLevel = Annotated[str, option("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR.", default="INFO")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Log to the folder only, not to stderr.")]
InsecureHttp = Annotated[
    bool, typer.Option("--insecure-http", help="Serve plain HTTP on an address that other machines reach.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout when the node is ready.")]

_POLL_S = 0.05


@app.command()
def controller(
    folder: Folder,
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    join_port: JoinPort = None,
    replicate_after: Annotated[
        float,
        option(
            "--replicate-after",
            metavar="SECONDS",
            help="A copy of a model that is missing for so long is made anew (`models replicate`).",
            default="600",
            min=0.0,
        ),
    ] = 600.0,
    log_level: LogLevel = "INFO",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a controller: the registry, the planner and the deployments of a cluster."""
    from eldric.controller.config import ControllerConfig
    from eldric.controller.main import run

    ports = _ports(http_port, grpc_port, join_port)
    node = _node("controller", folder, host=host, advertise=advertise, log_level=log_level, **ports)
    config = ControllerConfig(node, replicate_after_s=replicate_after)
    _serve(node, lambda: run(config), quiet=quiet, as_json=as_json)


@app.command()
def worker(
    folder: Folder,
    controllers: MaybeControllers = None,
    edge: Edge = "",
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    models: Annotated[
        Literal["mount", "http", "auto"],
        typer.Option("--models", help="Read models below the mount, over HTTP, or wherever the very same file is."),
    ] = "auto",
    models_dir: Annotated[
        Path | None,
        option(
            "--models-dir", metavar="FOLDER", help="Where the model store is mounted. Default: the store's own path."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        option(
            "--cache-dir",
            metavar="FOLDER",
            help="What was fetched over HTTP; workers of one machine may share it.",
            default="cache in the node's folder",
        ),
    ] = None,
    cache_bytes: Annotated[
        str,
        option("--cache-bytes", metavar="SIZE", help="Most of it, such as 200GB.", default="90% of what the disk has"),
    ] = "",
    lock: Annotated[
        Literal["auto", "on", "off"],
        typer.Option("--lock", help="Lock mapped weights in memory; auto: those that come from a file server."),
    ] = "auto",
    memory: Annotated[
        str,
        option("--memory", metavar="SIZE", help="Memory for stages: 24GB, 16GiB, 50%.", default="all of the device's"),
    ] = "",
    device: Annotated[
        str,
        option(
            "--device",
            metavar="NAME",
            help="What computes stages: CPU, CUDA0, Metal, Vulkan0.",
            default="a graphics device, else CPU",
        ),
    ] = "auto",
    threads: Annotated[
        int,
        option("--threads", metavar="N", help="Compute threads of a stage.", default="all cores", min=0),
    ] = 0,
    cpus: Annotated[
        str, option("--cpus", metavar="CORES", help="Cores to pin compute threads to, such as 0,2-5.")
    ] = "",
    queue: Annotated[
        int, option("--queue", metavar="N", help="Requests that may wait, per pipeline.", default="128", min=1)
    ] = 128,
    allow_insecure_tensors: Annotated[
        bool, typer.Option("--allow-insecure-tensors", help="Let a deployment ask for unencrypted tensor channels.")
    ] = False,
    trust_fabric: Annotated[
        bool,
        typer.Option(
            "--trust-fabric", help="Offer transports that have no encryption, such as ucx: the network is your own."
        ),
    ] = False,
    log_level: LogLevel = "INFO",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a worker: it holds stages of pipelines and computes them."""
    from eldric.worker.config import WorkerConfig
    from eldric.worker.main import run

    ports = _ports(http_port, grpc_port)
    node = _node(
        "worker",
        folder,
        host=host,
        advertise=advertise,
        controllers=controllers or (),
        edge=edge,
        log_level=log_level,
        **ports,
    )
    memory_bytes, memory_share = parse_memory(memory or "100%")
    config = WorkerConfig(
        node=node,
        models=models,
        models_dir=_absolute(models_dir),
        cache_dir=_absolute(cache_dir),
        cache_bytes=parse_bytes(cache_bytes) if cache_bytes else 0,
        lock=lock,
        device=device,
        memory_bytes=memory_bytes,
        memory_share=memory_share,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        queue=queue,
        allow_insecure_tensors=allow_insecure_tensors,
        trust_fabric=trust_fabric,
    )
    _serve(node, lambda: run(config), quiet=quiet, as_json=as_json)


data_app = options.new_app(name="data")
data_app.command()(export)
app.add_typer(data_app)


@data_app.callback(invoke_without_command=True)
def data(
    context: typer.Context,
    folder: MaybeFolder = None,
    models: Annotated[Path | None, option("--models", metavar="FOLDER", help="The model store's folder.")] = None,
    nfs: Annotated[
        str,
        option("--nfs", metavar="URL", help="Where the folder can be mounted from, if not by `data export`: nfs://..."),
    ] = "",
    ollama: Annotated[
        Path | None,
        option(
            "--ollama",
            metavar="FOLDER",
            help="An Ollama store to take models from.",
            default="OLLAMA_MODELS, else where Ollama keeps it",
            envvar="OLLAMA_MODELS",
            show_envvar=False,
        ),
    ] = None,
    transfers: Annotated[
        int,
        option(
            "--transfers", metavar="N", help="Answers with a model's bytes at once, over HTTP.", default="16", min=1
        ),
    ] = 16,
    controllers: MaybeControllers = None,
    edge: Edge = "",
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    log_level: LogLevel = "INFO",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a data worker: the model store. Or export its folder over NFS."""
    if context.invoked_subcommand is not None:
        return
    if folder is None or models is None:
        context.fail(f"missing option '{'--folder' if folder is None else '--models'}'")
    from eldric.data.config import DataConfig
    from eldric.data.main import run
    from eldric.nfs.address import NfsAddress

    ports = _ports(http_port, grpc_port)
    node = _node(
        "data",
        folder,
        host=host,
        advertise=advertise,
        controllers=controllers or (),
        edge=edge,
        log_level=log_level,
        **ports,
    )
    export_at = NfsAddress.parse(nfs) if nfs else None
    config = DataConfig(
        node, models.expanduser().resolve(), ollama=_absolute(ollama), nfs=export_at, transfers=transfers
    )
    _serve(node, lambda: run(config), quiet=quiet, as_json=as_json)


@app.command()
def router(
    folder: Folder,
    controllers: MaybeControllers = None,
    edge: Edge = "",
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    models: Annotated[
        Path | None,
        option("--models", metavar="FOLDER", help="Where the model store is mounted. Default: the store's own path."),
    ] = None,
    allow_origins: options.AllowOrigins = None,
    insecure_http: InsecureHttp = False,
    log_level: LogLevel = "INFO",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a router: the OpenAI-compatible API."""
    from eldric.router.config import RouterConfig
    from eldric.router.main import run

    node = _node(
        "router",
        folder,
        host=host,
        advertise=advertise,
        controllers=controllers or (),
        edge=edge,
        allow_origins=tuple(allow_origins or ()),
        insecure_http=insecure_http,
        log_level=log_level,
        **_ports(http_port, grpc_port),
    )
    _serve(node, lambda: run(RouterConfig(node, _absolute(models))), quiet=quiet, as_json=as_json)


@app.command("edge")
def edge_node(
    folder: Folder,
    controllers: Controllers,
    host: Host = "127.0.0.1",
    advertise: Advertise = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    join_port: JoinPort = None,
    ports: Annotated[
        str,
        option(
            "--ports",
            metavar="FIRST-LAST",
            help="Ports by which nodes behind NAT are reached: two for each, and one for each stage.",
            default="any that are free",
        ),
    ] = "",
    insecure_http: InsecureHttp = False,
    log_level: LogLevel = "INFO",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run an edge: nodes that others cannot connect to are members through it."""
    from eldric.edge.config import EdgeConfig, parse_ports
    from eldric.edge.main import run

    node = _node(
        "edge",
        folder,
        host=host,
        advertise=advertise,
        controllers=controllers,
        insecure_http=insecure_http,
        log_level=log_level,
        **_ports(http_port, grpc_port, join_port),
    )
    config = EdgeConfig(node, ports=parse_ports(ports) if ports else None)
    _serve(node, lambda: run(config), quiet=quiet, as_json=as_json)


def _absolute(path: Path | None) -> Path | None:
    """Without a look at the path itself: it may lie on a mount that hangs."""
    return Path(os.path.abspath(path.expanduser())) if path is not None else None


def _ports(http: int | None, grpc: int | None, join: int | None = None) -> dict[str, Any]:
    given = {"http_port": http, "grpc_port": grpc, "join_port": join}
    return {name: DEFAULT_PORT if port is None else port for name, port in given.items()}


def _node(kind: str, folder: Path, *, controllers: Sequence[str] = (), **settings: Any) -> NodeConfig:
    """The settings that all kinds share. Kind and name are the certificate's. Raises InvalidRequest, NotFound."""
    place = folder.expanduser().resolve()
    identity = Identity.load(place)
    if identity.kind != kind:
        raise InvalidRequest(
            f"{folder} is the folder of {identity.kind} {identity.name}: run `eldric-cli {identity.kind}` there"
        )
    return NodeConfig(kind=kind, name=identity.name, folder=place, controllers=tuple(controllers), **settings)


def _serve(node: NodeConfig, run: Callable[[], Coroutine[Any, Any, None]], *, quiet: bool, as_json: bool) -> None:
    """Until a signal ends the process."""
    logs.set_up(node, stderr=not quiet)

    async def serve() -> None:
        announcing = asyncio.create_task(_announce(node, as_json))
        try:
            await run()
        finally:
            announcing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await announcing

    asyncio.run(serve())


async def _announce(node: NodeConfig, as_json: bool) -> None:
    """Say where the node listens, once it does."""
    while (document := node_file.read(node.folder)) is None or document.get("pid") != os.getpid():
        await asyncio.sleep(_POLL_S)
    if as_json:
        from eldric.cli.output import print_json

        print_json({**document, "folder": str(node.folder)})
    elif sys.stdout.isatty():
        print(f"{node.kind} {node.name} is ready: gRPC {document['grpc_address']}, {document['http_url']}")
