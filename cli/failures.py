"""What a person, or a script, is told when a command fails."""

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from eldric.cli.showing import shown
from eldric.errors import EldricError, InvalidRequest

#: Exit code of a command whose reader went away.
BROKEN_PIPE = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """`code` is the name of a gRPC status; `message` one readable line."""

    code: str
    message: str
    exit_code: int = 1
    cause: BaseException | None = None


_OS_CODES = {
    errno.EACCES: "PERMISSION_DENIED",
    errno.EPERM: "PERMISSION_DENIED",
    errno.EROFS: "PERMISSION_DENIED",
    errno.ENOENT: "NOT_FOUND",
    errno.EEXIST: "ALREADY_EXISTS",
    errno.ENOSPC: "RESOURCE_EXHAUSTED",
    errno.EDQUOT: "RESOURCE_EXHAUSTED",
}


def check_text(arguments: Sequence[str]) -> None:
    """Raises InvalidRequest for what is not text in the encoding of the locale: everything is sent, or shown, as
    UTF-8."""
    for each in arguments:
        try:
            each.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"{each!a} is no text in this locale's encoding, {sys.getfilesystemencoding()}: write UTF-8, and use a "
                "locale of that, such as LC_ALL=C.UTF-8"
            ) from None


def failure_of(error: Exception) -> Failure:
    """What to say of an error. Errors raised on purpose say it themselves: they carry a status."""
    if isinstance(error, typer.TyperException):
        return Failure("INVALID_ARGUMENT", _usage(error), error.exit_code, error)
    if isinstance(error, typer.Abort):
        return Failure("CANCELLED", "the input ended", 1, error)
    if isinstance(error, OSError) and not isinstance(error, EldricError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure(_OS_CODES.get(error.errno or 0, "INTERNAL"), f"{where}{error.strerror or error}", 1, error)
    status = getattr(error, "status", None)
    if isinstance(status, str):
        return Failure(status, " ".join(str(error).split()), 1, error)
    line = f"this is a fault of the program: {type(error).__name__}: {error} (-v shows where)"
    return Failure("INTERNAL", " ".join(line.split()), 1, error)


def _usage(error: typer.TyperException) -> str:
    """click's complaint, as one line, with the help that belongs to it."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "eldric-cli"
    return f"{text[:1].lower()}{text[1:]}; see `{path} --help`"


def report(failure: Failure, *, as_json: bool, verbose: bool) -> int:
    """Say it, on stderr and, as JSON, on stdout; returns the exit code."""
    try:
        if verbose and failure.cause is not None:
            traceback.print_exception(failure.cause)
        print(f"error: {shown(failure.message, sys.stderr)}", file=sys.stderr)
    except BrokenPipeError:
        quiet_pipe()
    return report_json(failure) if as_json else failure.exit_code


def report_json(failure: Failure) -> int:
    """Say it on stdout; returns the exit code."""
    try:
        print(json.dumps({"error": {"code": failure.code, "message": failure.message}}, ensure_ascii=False))
        sys.stdout.flush()
    except BrokenPipeError:
        quiet_pipe()
    return failure.exit_code


def quiet_pipe() -> int:
    """Whoever read our output is gone: say nothing more, not even when Python flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    return BROKEN_PIPE
