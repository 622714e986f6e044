"""The eldric-cli command: what becomes of its arguments, its errors and its interrupts."""

import os
import sys
from typing import Annotated

import typer

from eldric import __version__
from eldric.cli import interrupts
from eldric.cli.commands import Commands
from eldric.cli.failures import BROKEN_PIPE, Failure, check_text, failure_of, quiet_pipe, report, report_json

app = typer.Typer(cls=Commands, add_completion=True, rich_markup_mode=None, context_settings={"max_content_width": 100})


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"eldric {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def eldric_cli(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show tracebacks and gRPC's own lines. May stand anywhere.")
    ] = False,
) -> None:
    """Runs language models that are larger than any one machine, on the machines you already have."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def run(arguments: list[str]) -> int:
    """Do what the arguments say; returns the exit code.

    0: done. 1: an error, one line on stderr. 2: wrong usage. 130: Ctrl-C. With --json an error, or an interrupt, is
    also an object {"error": {"code", "message"}} on stdout; its code is the name of a gRPC status.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = arguments[:end], arguments[end:]
    as_json, verbose = "--json" in options, any(each in ("-v", "--verbose") for each in options)
    if not verbose:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core's own lines, as of strangers' failed handshakes
    kept = [each for each in options if each not in ("-v", "--verbose")]
    command = typer.main.get_command(app)
    try:
        check_text(kept + rest)
        with interrupts.as_exceptions():
            code = command.main(args=[*kept, *rest], prog_name="eldric-cli", standalone_mode=False)
            sys.stdout.flush()
    except BrokenPipeError:
        return quiet_pipe()
    except SystemExit as ended:
        return quiet_pipe() if ended.code == BROKEN_PIPE else int(ended.code or 0)
    except KeyboardInterrupt:
        code = interrupts.INTERRUPTED
    except Exception as error:
        return report(failure_of(error), as_json=as_json, verbose=verbose)
    if code == interrupts.INTERRUPTED and as_json:
        return report_json(Failure("CANCELLED", "interrupted", interrupts.INTERRUPTED))
    return int(code or 0)


def main() -> None:
    """Entry point. What is written, by nodes that are started too, is never for others to write."""
    os.umask(os.umask(0o077) | 0o022)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
