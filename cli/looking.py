"""eldric-cli status, workers, ps and logs: what there is and what it says."""

import time
from typing import Annotated

import typer
from rich.live import Live

from eldric.cli import options
from eldric.cli.clusters import local_folder
from eldric.cli.completion import pipelines as complete_pipelines
from eldric.cli.connect import client_of
from eldric.cli.local import LocalCluster
from eldric.cli.log_files import Follower, last_lines
from eldric.cli.output import out, print_json
from eldric.cli.tables import nodes_view, pipelines_view, workers_view
from eldric.client import Client
from eldric.errors import NotFound

app = options.new_app()

_WATCH_S = 1.0
_FOLLOW_S = 0.2


@app.command()
def status(
    name: Annotated[str, typer.Argument(help="Only this pipeline.", autocompletion=complete_pipelines)] = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second, until Ctrl-C.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Show the pipelines with their stages: layers, memory, step time, state.

    Layers are counted from 0. With --watch, --json prints an object a line.
    """
    with client_of(folder, controller) as client:
        if watch:
            _watch(client, name, as_json)
        elif as_json:
            print_json({"pipelines": client.status(name)})
        else:
            out.print(pipelines_view(client.status(name)))


def _watch(client: Client, name: str, as_json: bool) -> None:
    if as_json or not out.is_terminal:
        while True:
            found = client.status(name)
            if as_json:
                print_json({"pipelines": found})
            else:
                out.print(pipelines_view(found))
            time.sleep(_WATCH_S)
    with Live(pipelines_view(client.status(name)), console=out, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_S)
            live.update(pipelines_view(client.status(name)), refresh=True)


@app.command()
def workers(folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False) -> None:
    """List the workers: state, devices, memory."""
    with client_of(folder, controller) as client:
        found = client.workers()
    if as_json:
        print_json({"workers": found})
    else:
        out.print(workers_view(found))


@app.command()
def ps(folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False) -> None:
    """List all nodes of the cluster, and the pipelines that run."""
    with client_of(folder, controller) as client:
        nodes, pipelines = client.nodes(), client.status()
    if as_json:
        print_json({"nodes": nodes, "pipelines": pipelines})
        return
    out.print(nodes_view(nodes))
    for info in pipelines:
        slots = f"{info.slots_used}/{info.slots} slots"
        out.print(f"{info.name}  {info.state}  {len(info.stages)} stages, {slots}, {info.queued} waiting")


@app.command()
def logs(
    node: Annotated[str, typer.Argument(help="Name of a node, as in `ps`. Default: all.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    folder: options.Dir = None,
    as_json: options.Json = False,
) -> None:
    """Show the logs of a local cluster's nodes.

    With --follow, --json prints an object a line: {"node", "line"}.
    """
    processes = LocalCluster.load(local_folder(folder)).processes()
    chosen = [process for process in processes if node in ("", process.entry.name)]
    if not chosen:
        names = ", ".join(process.entry.name for process in processes)
        raise NotFound(f"no node {node!r}; there are {names}")
    followers = {process.entry.name: Follower(process.log) for process in chosen}
    last = {process.entry.name: last_lines(process.log, lines) for process in chosen}
    if as_json and not follow:
        print_json({"logs": last})
        return
    for name, text in last.items():
        for line in text:
            _show(name, line, as_json)
    while follow:
        for name, follower in followers.items():
            for line in follower.new_lines():
                _show(name, line, as_json)
        time.sleep(_FOLLOW_S)


def _show(node: str, line: str, as_json: bool) -> None:
    if as_json:
        print_json({"node": node, "line": line})
    else:
        out.print(f"{node}: {line}", soft_wrap=True)
