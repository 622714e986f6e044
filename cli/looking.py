"""eldric-cli status, workers and ps: what there is."""

import time
from typing import Annotated

import typer
from rich.live import Live

from eldric.cli import options
from eldric.cli.completion import pipelines as complete_pipelines
from eldric.cli.connect import client_of
from eldric.cli.output import out, print_json
from eldric.cli.tables import nodes_view, pipelines_view, workers_view
from eldric.client import Client

app = options.new_app()

_WATCH_S = 1.0


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
        stages = "1 stage" if len(info.stages) == 1 else f"{len(info.stages)} stages"
        slots = f"{info.slots_used}/{info.slots} slots"
        out.print(f"{info.name}  {info.state}  {stages}, {slots}, {info.queued} waiting")
