"""Options and arguments that many commands share, so that they are spelled, explained and completed once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from eldric.cli import completion

Dir = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Folder of a local cluster. Default: ELDRIC_DIR.", show_default=False),
]
Controller = Annotated[
    str | None,
    typer.Option(
        "--controller",
        metavar="HOST:PORT",
        help="A controller's gRPC address. Default: ELDRIC_CONTROLLER, else the context.",
        show_default=False,
    ),
]


def option(*names: str, metavar: str, help: str, default: str = "", **more: Any) -> Any:
    """An option that takes a value. `default`: what is meant when it is not given, for people."""
    text = f"{help} Default: {default}." if default else help
    return typer.Option(*names, metavar=metavar, help=text, show_default=False, **more)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else, an object a line.")]
AllowOrigins = Annotated[
    list[str] | None,
    option(
        "--allow-origin",
        metavar="ORIGIN",
        help="A site whose web pages may call, such as https://chat.example.org, or * for all; may be repeated.",
        default="none",
    ),
]
Pipeline = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the pipeline.", autocompletion=completion.pipelines)
]
Model = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the model in the store.", autocompletion=completion.models)
]


def new_app(**settings: str) -> typer.Typer:
    """A set of commands, for `commands.SECTIONS`. Help is plain text: it comes faster, and reads well everywhere."""
    return typer.Typer(rich_markup_mode=None, **settings)  # type: ignore[arg-type]
