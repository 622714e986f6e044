"""The eldric-cli command: its subcommands, and what becomes of an error."""

import sys

import typer

from eldric.cli import clusters, deployments, looking, models, nodes, text
from eldric.errors import EldricError

app = typer.Typer(
    name="eldric-cli",
    help="Runs language models that are larger than any one machine, on the machines you already have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (clusters.app, deployments.app, text.app, looking.app, nodes.app):
    app.registered_commands.extend(part.registered_commands)
app.add_typer(models.app)


def main() -> None:
    """Entry point. An error is one line on stderr and exit code 1; a wrong option is exit code 2."""
    try:
        app()
    except EldricError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
