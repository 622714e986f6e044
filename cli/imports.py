"""The progress of a model on its way into the store."""

from collections.abc import Iterable

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from eldric.cli.output import err
from eldric.client import ImportProgress, ModelInfo
from eldric.errors import Unavailable


def progress_bar(quiet: bool) -> Progress:
    """Bytes done, their speed and the time left, on stderr; nothing where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal,
    )


def follow_import(events: Iterable[ImportProgress | ModelInfo], *, quiet: bool) -> ModelInfo:
    """Show an import's progress and return the model."""
    with progress_bar(quiet) as progress:
        line = progress.add_task("reading", total=None)
        for event in events:
            if isinstance(event, ModelInfo):
                return event
            progress.update(line, description=event.phase, completed=event.done_bytes, total=event.total_bytes or None)
    raise Unavailable("the data worker ended the import without a word")
