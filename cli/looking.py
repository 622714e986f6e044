"""eldric-cli workers, ps and logs: what there is and what it says."""

import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from eldric.cli import options
from eldric.cli.clusters import local_folder
from eldric.cli.connect import client_of
from eldric.cli.local import LocalCluster
from eldric.cli.output import human_bytes, out, print_json, table
from eldric.errors import NotFound

app = typer.Typer()

_FOLLOW_S = 0.2


@app.command()
def workers(folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False) -> None:
    """List the workers: state, devices, memory."""
    with client_of(folder, controller) as client:
        found = client.workers()
    if as_json:
        print_json({"workers": found})
        return
    listing = table("name", "state", "right:pid", "right:cores", "right:memory", "right:used", "engine", "devices")
    for worker in found:
        listing.add_row(
            worker.name,
            worker.state,
            str(worker.pid),
            str(worker.cores),
            human_bytes(worker.memory_bytes),
            human_bytes(worker.memory_used_bytes),
            worker.engine,
            ", ".join(worker.devices),
        )
    out.print(listing if found else "no worker has joined; `eldric-cli join` makes this machine one")


@app.command()
def ps(folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False) -> None:
    """List all nodes of the cluster, and the pipelines that run."""
    with client_of(folder, controller) as client:
        nodes, pipelines = client.nodes(), client.status()
    if as_json:
        print_json({"nodes": nodes, "pipelines": pipelines})
        return
    listing = table("kind", "name", "state", "right:pid", "gRPC", "HTTP")
    for node in nodes:
        listing.add_row(node.kind, node.name, node.state, str(node.pid), node.grpc_address, node.http_url)
    out.print(listing)
    for info in pipelines:
        out.print(f"{info.name}  {info.state}  {len(info.stages)} stages, {info.slots_used}/{info.slots} slots")


@app.command()
def logs(
    node: Annotated[str, typer.Argument(help="Name of a node, as in `ps`. Default: all.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines of each log.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    folder: options.Dir = None,
    as_json: options.Json = False,
) -> None:
    """Show the logs of a local cluster's nodes."""
    processes = LocalCluster.load(local_folder(folder)).processes()
    chosen = [process for process in processes if node in ("", process.entry.name)]
    if not chosen:
        names = ", ".join(process.entry.name for process in processes)
        raise NotFound(f"no node {node!r}; there are {names}")
    last = {process.entry.name: _last_lines(process.log, lines) for process in chosen}
    if as_json:
        print_json({"logs": last})
        return
    for name, text in last.items():
        for line in text:
            out.print(f"{name}: {line}", markup=False)
    if follow:
        _follow({process.entry.name: process.log for process in chosen})


def _last_lines(path: Path, count: int) -> list[str]:
    try:
        with open(path, errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=max(0, count))]
    except FileNotFoundError:
        return []


def _follow(paths: dict[str, Path]) -> None:
    """Print what is written from now on. A log that begins anew is read from its beginning."""
    read = {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}
    while True:
        for name, path in paths.items():
            size = path.stat().st_size if path.exists() else 0
            if size < read[name]:
                read[name] = 0
            if size > read[name]:
                with open(path, "rb") as file:
                    file.seek(read[name])
                    text = file.read(size - read[name])
                whole = text[: text.rfind(b"\n") + 1]
                read[name] += len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    out.print(f"{name}: {line}", markup=False)
        time.sleep(_FOLLOW_S)
