"""Options that many commands share, so that they are spelled and explained once."""

from pathlib import Path
from typing import Annotated

import typer

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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
