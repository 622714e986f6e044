"""How commands speak: results on stdout, progress and complaints on stderr, one JSON object where --json asks."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from eldric.cli.showing import shown

#: Width of lines that go into a file or a pipe: whoever reads them there wants them whole.
_WIDE = 1000
#: Least width of a column whose text wraps.
_LEAST_TEXT = 24


class _Console(Console):
    """Colours and moving lines on a terminal only, and no colours where NO_COLOR is set; both are rich's defaults."""

    def __init__(self, *, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if terminal else _WIDE)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(shown(text, sys.stderr if self.stderr else sys.stdout), **settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*objects, **{"crop": False, **settings})

    def on_broken_pipe(self) -> None:
        raise  # what rich caught before it called this: the command ends quietly, see main.run


#: Results.
out = _Console()
#: Progress and complaints.
err = _Console(stderr=True)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and bytes as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value


def print_json(value: Any) -> None:
    """One object, on one line."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


class _Listing(Table):
    """A table that is as wide as it must be: on a narrow terminal its lines wrap, and no name or address is cut."""

    def __init__(self) -> None:
        super().__init__(box=None, pad_edge=False, header_style="bold")
        self._least: list[int] = []

    def add_row(self, *cells: Any, **settings: Any) -> None:
        super().add_row(*cells, **settings)
        for index, (column, cell) in enumerate(zip(self.columns, cells, strict=False)):
            width = max(map(cell_len, str(cell).splitlines()), default=0)
            self._least[index] = max(self._least[index], width if column.no_wrap else min(width, _LEAST_TEXT))

    def add_column(self, *names: Any, **settings: Any) -> None:
        super().add_column(*names, **settings)
        self._least.append(cell_len(str(names[0])))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least = sum(self._least) + 2 * len(self._least)
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, least)))


def table(*columns: str) -> Table:
    """A plain table. Before a column's name, `right:` aligns its numbers, and `text:` lets it wrap within itself."""
    made = _Listing()
    for column in columns:
        kind, _, name = column.rpartition(":")
        wraps = kind == "text"
        made.add_column(name, justify="right" if kind == "right" else "left", no_wrap=not wraps, overflow="fold")
    return made


def human_bytes(count: float) -> str:
    """Binary units, as memory is counted: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
