"""eldric-cli up and down: a cluster of processes on this machine."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from eldric.cli import options
from eldric.cli.connect import local_folder
from eldric.cli.folder_lock import locked
from eldric.cli.local import LocalCluster
from eldric.cli.options import option
from eldric.cli.output import err, out, print_json, table
from eldric.cli.processes import NodeProcess
from eldric.cli.roster import Shape
from eldric.client import Client

app = options.new_app()


@app.command()
def up(
    workers: Annotated[int | None, option("--workers", metavar="N", help="Number of workers.", default="2")] = None,
    folder: options.Dir = None,
    memory: Annotated[
        str | None,
        option("--memory", metavar="SIZE", help="Memory of each worker.", default="the device's, shared evenly"),
    ] = None,
    device: Annotated[
        str | None,
        option(
            "--device",
            metavar="NAMES",
            help="What computes stages: CPU, or CUDA0,CUDA1 for workers to take in turn.",
            default="a graphics device, else CPU",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        option("--threads", metavar="N", help="Compute threads of each worker.", default="cores / workers"),
    ] = None,
    pin: Annotated[
        bool | None, typer.Option("--pin/--no-pin", help="Give each worker cores of its own.", show_default="no-pin")
    ] = None,
    router_port: Annotated[
        int | None,
        option("--router-port", metavar="PORT", help="Port of the OpenAI API.", default="a free one", min=0, max=64535),
    ] = None,
    allow_origins: options.AllowOrigins = None,
    as_json: options.Json = False,
) -> None:
    """Start a cluster on this machine, in the background, and wait until it is ready.

    On a folder whose cluster was made before, starts what does not run.
    """
    place = local_folder(folder)
    asked = {
        "workers": workers,
        "device": device,
        "memory": memory,
        "threads": threads,
        "pin": pin,
        "router_port": router_port,
        "allow_origins": tuple(allow_origins) if allow_origins else None,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    shape = Shape(**given)

    def say(line: str) -> None:
        if not as_json:
            err.print(line, style="dim")

    with locked(place, say):
        cluster = LocalCluster.open(place, shape, given.keys())
        summary = summarize(place, cluster.up(say))
        left = [] if as_json else _not_ready(place)
    if as_json:
        print_json(summary)
        return
    listing = table("node", "kind", "right:pid", "address")
    for node in summary["nodes"]:
        listing.add_row(node["name"], node["kind"], str(node["pid"]), node["http_url"])
    out.print(listing)
    out.print(f"\nOpenAI API   {summary['router_url']}/v1")
    for name in left:
        out.print(
            f"{name} was deployed before and is being loaded again; see `eldric-cli status{which(folder, place)}`"
        )
    out.print(f"next         eldric-cli deploy MODEL{which(folder, place)}")


@app.command()
def down(folder: options.Dir = None, as_json: options.Json = False) -> None:
    """End a local cluster. Its models and certificates stay in the folder."""
    place = local_folder(folder)
    LocalCluster.load(place)

    def say(line: str) -> None:
        if not as_json:
            err.print(line, style="dim")

    with locked(place, say):
        count, killed = LocalCluster.load(place).down(say)
    if as_json:
        print_json({"dir": str(place), "stopped": count, "killed": [entry.name for entry in killed]})
    elif not count:
        out.print("nothing was running")
    for entry in killed:
        err.print(f"{entry.kind} {entry.name} did not end by itself and was killed", style="yellow")


def _not_ready(folder: Path) -> list[str]:
    """Pipelines that were deployed before the cluster went down."""
    with Client(folder=folder) as client:
        return [info.name for info in client.status() if info.state != "ready"]


def which(folder: Path | None, place: Path) -> str:
    """The option that makes the next command find the same cluster, where it needs one."""
    return "" if folder is None else f" --dir {shlex.quote(str(place))}"


def summarize(folder: Path, nodes: list[NodeProcess]) -> dict[str, Any]:
    """What `up --json` prints."""
    by_kind = {process.entry.kind: process for process in nodes}
    return {
        "dir": str(folder),
        "controller": by_kind["controller"].grpc_address,
        "controller_url": by_kind["controller"].http_url,
        "join_address": by_kind["controller"].join_address,
        "router_url": by_kind["router"].http_url,
        "nodes": [
            {
                "name": process.entry.name,
                "kind": process.entry.kind,
                "pid": process.pid,
                "grpc_address": process.grpc_address,
                "http_url": process.http_url,
                "folder": str(process.folder),
            }
            for process in nodes
        ],
    }
