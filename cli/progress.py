"""Live progress on stderr: moving bars on a terminal, a line per change elsewhere, nothing beside --json."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from eldric.cli.output import err, human_bytes
from eldric.client import (
    DeployEvent,
    ImportProgress,
    ModelInfo,
    PipelineInfo,
    Plan,
    PullEvent,
    ResolvedSource,
    StageProgress,
)
from eldric.errors import InvalidRequest, Unavailable

#: Columns of a terminal that a bar and the numbers beside it need.
_ROOM = 72


class _Sizes(DownloadColumn):
    """Nothing as long as nobody knows how many bytes there are."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


def _columns(*, rate: bool) -> list[ProgressColumn]:
    phase = TextColumn("{task.fields[phase]}")
    if err.width < _ROOM:
        return [TextColumn("{task.description}", table_column=Column()), TaskProgressColumn(), phase]
    speed: list[ProgressColumn] = [TransferSpeedColumn(), TimeRemainingColumn()] if rate else []
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _Sizes(binary_units=True),
        phase,
        *speed,
        TimeElapsedColumn(),
    ]


class Tracker:
    """Lines of progress, each of a number of bytes in a phase."""

    def __init__(self, *, quiet: bool, rate: bool = False) -> None:
        """rate: it takes long: show how fast it goes and when it ends, and beside a terminal a line every 10 %."""
        self._quiet, self._rate = quiet, rate
        self._live = not quiet and err.is_terminal and not err.is_dumb_terminal
        self._progress = Progress(*_columns(rate=rate), console=err, disable=not self._live)
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
        elif not self._quiet:
            line = f"{phase} {done_bytes * 10 // total_bytes * 10} %" if self._rate and total_bytes else phase
            if self._phases.get(title) != line:
                self._phases[title] = line
                err.print(f"{title}  {line}")

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


def follow_pull(
    events: Iterable[PullEvent], seen: list[PullEvent], *, quiet: bool, to_deploy: bool = False
) -> tuple[ResolvedSource, ModelInfo]:
    """Show what a source turned out to be and a pull's progress; return both ends. Each event is put into `seen`.

    to_deploy: raises InvalidRequest when the source says that it is no model to be deployed.
    """
    resolved = ResolvedSource("", "", "", (), 0, 0)
    with Tracker(quiet=quiet, rate=True) as tracker:
        for event in events:
            seen.append(event)
            match event:
                case ResolvedSource():
                    resolved = event
                    if not quiet:
                        err.print(what_it_is(event))
                    if event.problem and to_deploy:
                        raise InvalidRequest(f"{event.name} cannot be deployed: {event.problem}")
                    if event.problem and not quiet:
                        err.print(f"it cannot be deployed: {event.problem}", style="yellow")
                case ImportProgress(phase, done, total) if resolved.name:
                    tracker.update(resolved.name, phase, done, total)
                case ModelInfo():
                    tracker.finish("done")
                    return resolved, event
    raise Unavailable("the data worker ended the pull without a word")


def what_it_is(resolved: ResolvedSource) -> str:
    """A line about a source: "tale is hf://o/r:Q4_K_M: 2 files, 40.0 GiB, of which 1.0 GiB are here already"."""
    files = "1 file" if len(resolved.files) == 1 else f"{len(resolved.files)} files"
    kept = f", of which {human_bytes(resolved.kept_bytes)} are here already" if resolved.kept_bytes else ""
    return f"{resolved.name} is {resolved.source}: {files}, {human_bytes(resolved.size_bytes)}{kept}"


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
