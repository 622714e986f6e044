"""eldric-cli up and down: a cluster of processes on this machine."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from eldric.cli import options
from eldric.cli.local import LocalCluster, NodeEntry, NodeProcess
from eldric.cli.nodes import parse_bytes
from eldric.cli.output import err, out, print_json, table
from eldric.client.cluster import CLUSTER_FILE
from eldric.errors import AlreadyExists, DeadlineExceeded, InvalidRequest

app = typer.Typer()

#: Longest wait until every node is registered.
_READY_S = 30.0


@app.command()
def up(
    workers: Annotated[int | None, typer.Option("--workers", help="Number of workers.", show_default="2")] = None,
    folder: options.Dir = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory of each worker. Default: this machine's, shared evenly.")
    ] = "",
    threads: Annotated[int, typer.Option("--threads", help="Compute threads of each worker. 0: cores / workers.")] = 0,
    pin: Annotated[bool, typer.Option("--pin", help="Give each worker cores of its own.")] = False,
    router_port: Annotated[int, typer.Option("--router-port", help="Port of the OpenAI API. 0: a free one.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Start a cluster on this machine, in the background, and wait until it is ready.

    On a folder whose cluster was made before, starts what does not run.
    """
    place = local_folder(folder)
    if (place / CLUSTER_FILE).exists():
        cluster = LocalCluster.load(place)
        _check_same(cluster, workers)
    else:
        count = 2 if workers is None else workers
        cluster = LocalCluster.create(place, roster(place, count, memory, threads, pin, router_port))
    cluster.start(lambda line: None if as_json else err.print(line, style="dim"))
    wait_until_registered(cluster)
    summary = _summary(cluster)
    if as_json:
        print_json(summary)
        return
    listing = table("node", "kind", "right:pid", "address")
    for process in cluster.processes():
        listing.add_row(process.entry.name, process.entry.kind, str(process.pid), process.http_url)
    out.print(listing)
    out.print(f"\nOpenAI API   {summary['router_url']}/v1")
    out.print(f"next         eldric-cli models add FILE --dir {place}")


@app.command()
def down(folder: options.Dir = None, as_json: options.Json = False) -> None:
    """End a local cluster. Its models and certificates stay in the folder."""
    place = local_folder(folder)
    cluster = LocalCluster.load(place)
    running = [process for process in cluster.processes() if process.running]
    killed = cluster.stop(lambda line: None if as_json else err.print(line, style="dim"))
    if as_json:
        names = [process.entry.name for process in killed]
        print_json({"dir": str(place), "stopped": len(running), "killed": names})
    elif not running:
        out.print("nothing was running")
    for process in killed:
        err.print(f"{process.entry.kind} {process.entry.name} did not end and was killed", style="yellow")


def local_folder(folder: Path | None) -> Path:
    """Where the local cluster lies: what was asked for, ELDRIC_DIR, or ./eldric-cluster. Absolute."""
    return (folder or Path(os.environ.get("ELDRIC_DIR") or "eldric-cluster")).resolve()


def _check_same(cluster: LocalCluster, workers: int | None) -> None:
    known = sum(entry.kind == "worker" for entry in cluster.nodes)
    if workers is not None and workers != known:
        raise AlreadyExists(
            f"{cluster.folder} holds a cluster of {known} workers: end it and remove the folder, or use another --dir"
        )


def roster(
    folder: Path, workers: int, memory: str = "", threads: int = 0, pin: bool = False, router_port: int = 0
) -> list[NodeEntry]:
    """The nodes of a local cluster; memory and cores are shared evenly among the workers."""
    if not 1 <= workers <= 64:
        raise InvalidRequest(f"{workers} workers; 1 to 64 fit on one machine")
    cores = psutil.cpu_count() or 1
    share = parse_bytes(memory) if memory else psutil.virtual_memory().total // workers
    each = threads or max(1, cores // workers)
    ports = ("--http-port", "0")
    nodes = [
        NodeEntry("controller", "controller", ports),
        NodeEntry("data", "data", (*ports, "--models", str(folder / "models"))),
        NodeEntry("router", "router", ("--http-port", str(router_port))),
    ]
    for index in range(workers):
        arguments = [*ports, "--models", str(folder / "models"), "--memory", str(share), "--threads", str(each)]
        if pin:
            own = [(index * each + offset) % cores for offset in range(each)]
            arguments += ["--cpus", ",".join(map(str, own))]
        nodes.append(NodeEntry("worker", f"worker-{index + 1}", tuple(arguments)))
    return nodes


def wait_until_registered(cluster: LocalCluster) -> None:
    """Every node's process runs; wait until the controller counts them all as up."""
    from eldric.client import Client

    deadline = time.monotonic() + _READY_S
    expected = {(entry.kind, entry.name) for entry in cluster.nodes}
    with Client(folder=cluster.folder) as client:
        while True:
            missing = expected - {(node.kind, node.name) for node in client.nodes() if node.state == "up"}
            if not missing:
                return
            if time.monotonic() > deadline:
                names = ", ".join(sorted(name for _, name in missing))
                raise DeadlineExceeded(f"not registered after {_READY_S:.0f} s: {names}; see `eldric-cli logs`")
            time.sleep(0.02)


def _summary(cluster: LocalCluster) -> dict[str, Any]:
    processes = cluster.processes()
    router = next(process for process in processes if process.entry.kind == "router")
    controller = next(process for process in processes if process.entry.kind == "controller")
    return {
        "dir": str(cluster.folder),
        "controller": controller.grpc_address,
        "controller_url": controller.http_url,
        "router_url": router.http_url,
        "nodes": [_node(process) for process in processes],
    }


def _node(process: NodeProcess) -> dict[str, Any]:
    return {
        "name": process.entry.name,
        "kind": process.entry.kind,
        "pid": process.pid,
        "grpc_address": process.grpc_address,
        "http_url": process.http_url,
        "folder": str(process.folder),
    }
