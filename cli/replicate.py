"""eldric-cli models replicate: copies of a model on more data workers."""

import contextlib
from typing import Annotated

import typer

from eldric.cli import completion, options
from eldric.cli.connect import client_of
from eldric.cli.options import option
from eldric.cli.output import out, print_json
from eldric.cli.progress import Tracker
from eldric.client import ModelReplicas
from eldric.errors import InvalidRequest, Unavailable


def replicate(
    name: options.Model,
    to: Annotated[
        str,
        option(
            "--to",
            metavar="DATA-WORKER",
            help="The data worker that gets a copy.",
            autocompletion=completion.data_workers,
        ),
    ] = "",
    copies: Annotated[
        int | None,
        option("--copies", metavar="N", help="Data workers that should hold it.", default="2", min=1),
    ] = None,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Have several data workers hold a model.

    Workers read from all of them, and one may fail. The controller keeps the number up: a copy that is gone for ten
    minutes (its --replicate-after) is made anew on another data worker. With --to one copy is made, once.
    """
    if to and copies is not None:
        raise InvalidRequest("--to and --copies exclude each other: name a data worker, or say how many copies")
    with client_of(folder, controller) as client, Tracker(quiet=as_json) as tracker:
        made: ModelReplicas | None = None
        with contextlib.closing(client.models.replicate_events(name, to, copies or 2)) as events:
            for event in events:
                if isinstance(event, ModelReplicas):
                    made = event
                else:
                    title = f"{name} to {event.data_worker}"
                    tracker.update(title, event.phase, event.done_bytes, event.total_bytes)
        tracker.finish("done")
    if made is None:
        raise Unavailable("the copies ended without a word")
    if as_json:
        print_json(made)
    else:
        out.print(f"{name} is on {', '.join(made.data_workers)}")


def register(app: typer.Typer) -> None:
    """Adds the command to `models`."""
    app.command()(replicate)
