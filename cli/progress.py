"""Live progress on stderr: moving bars on a terminal, a line per change elsewhere, nothing beside --json."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from eldric.cli.output import err
from eldric.client import DeployEvent, ImportProgress, ModelInfo, PipelineInfo, Plan, StageProgress
from eldric.errors import Unavailable


class Tracker:
    """Lines of progress, each of a number of bytes in a phase."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = not quiet and err.is_terminal and not err.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
            console=err,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._phases: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, title: str, phase: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """Show how far something is; a total of 0 is unknown."""
        if self._live:
            task = self._tasks.get(title)
            if task is None:
                task = self._tasks[title] = self._progress.add_task(title, total=None, phase=phase)
            self._progress.update(task, completed=done_bytes, total=total_bytes or None, phase=phase)
        elif not self._quiet and self._phases.get(title) != phase:
            self._phases[title] = phase
            err.print(f"{title}  {phase}")

    def finish(self, phase: str) -> None:
        """Everything is done: full bars."""
        for task in self._progress.tasks:
            if task.id in self._tasks.values():
                total = task.total or task.completed or 1
                self._progress.update(task.id, completed=total, total=total, phase=phase)


def follow_import(events: Iterable[ImportProgress | ModelInfo], title: str, *, quiet: bool) -> ModelInfo:
    """Show an import's progress and return the model."""
    with Tracker(quiet=quiet) as tracker:
        for event in events:
            if isinstance(event, ModelInfo):
                tracker.finish("done")
                return event
            tracker.update(title, event.phase, event.done_bytes, event.total_bytes)
    raise Unavailable("the data worker ended the import without a word")


def follow_deploy(events: Iterable[DeployEvent], *, quiet: bool) -> PipelineInfo:
    """Show a deployment's progress, one line per stage, and return the pipeline that came of it."""
    titles: dict[int, str] = {}
    sizes: dict[int, int] = {}
    with Tracker(quiet=quiet) as tracker:
        for event in events:
            match event:
                case Plan(stages=stages):
                    for stage in stages:
                        titles[stage.index] = stage_title(stage.index, stage.layers, stage.worker)
                        sizes[stage.index] = stage.weights_bytes
                        tracker.update(titles[stage.index], "waiting", 0, stage.weights_bytes)
                case StageProgress(index=index):
                    title = titles.setdefault(index, f"stage {index}  {event.worker}")
                    known = event.total_bytes or sizes.get(index, 0)
                    done = event.done_bytes if event.total_bytes else known * _is_loaded(event.phase)
                    tracker.update(title, event.phase, done, known)
                case PipelineInfo():
                    tracker.finish("ready")
                    return event
    raise Unavailable("the controller ended the deployment without a word")


def _is_loaded(phase: str) -> bool:
    return phase in ("loaded", "connected")


def stage_title(index: int, layers: tuple[int, int], worker: str) -> str:
    return f"stage {index}  layers {layer_range(layers)}  {worker}"


def layer_range(layers: tuple[int, int]) -> str:
    """A half-open range as a person counts: first and last."""
    first, end = layers
    return f"{first}" if end - first == 1 else f"{first}-{end - 1}"
