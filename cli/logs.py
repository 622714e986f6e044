"""eldric-cli logs: what the nodes of a local cluster write down."""

import time
from typing import Annotated

import typer

from eldric.cli import completion, options
from eldric.cli.connect import local_folder
from eldric.cli.local import LocalCluster
from eldric.cli.log_files import Follower, last_lines
from eldric.cli.output import out, print_json
from eldric.errors import NotFound
from eldric.nearest import known_names

app = options.new_app()

_FOLLOW_S = 0.2


@app.command()
def logs(
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE", help="Name of a node, as in `ps`. Default: all.", autocompletion=completion.local_nodes
        ),
    ] = "",
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
        names = [process.entry.name for process in processes]
        raise NotFound(f"there is no node {node!r}; {known_names(node, names)}")
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
