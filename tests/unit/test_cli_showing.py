"""What models and other machines say, on a person's terminal."""

import io
import sys
from collections.abc import Iterator

import pytest

from eldric.cli import generating
from eldric.cli.failures import Failure, report
from eldric.cli.output import _Console, table
from eldric.client import Delta, Event, Finished

#: Writes the clipboard, sets the title, hides and overwrites words, in 7 and in 8 bits.
HOSTILE = "good\x1b]52;c;cm0gLXJm\x07\x1b]0;title\x07\x1b[8mhidden\x1b[2K\rover\x9b2J\x08\x7f\n\ttext é"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def is_tame(text: str) -> bool:
    return not any((ord(each) < 32 and each not in "\n\t") or 127 <= ord(each) < 160 for each in text)


def generation() -> Iterator[Event]:
    for piece in HOSTILE:  # a model's pieces are cut anywhere
        yield Delta(piece, ())
    yield Finished("stop", 1, 1, 1.0, 1.0, 1.0)


def test_what_a_model_says_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    said: list[str] = []
    generating.stream(generation(), said)
    assert is_tame(terminal.getvalue())
    assert terminal.getvalue().startswith("good\ufffd]52;") and terminal.getvalue().endswith("\n\ttext é\n")
    assert "".join(said) == HOSTILE


def test_a_file_gets_what_a_model_says_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    generating.stream(generation())
    assert file.getvalue() == f"{HOSTILE}\n"


def test_what_another_machine_complains_of_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report(Failure("UNAVAILABLE", HOSTILE), as_json=False, verbose=False)
    assert is_tame(terminal.getvalue())


def test_tables_do_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    console, shown = _Console(), table("name")
    shown.add_row(HOSTILE)
    console.print(shown)
    console.print(HOSTILE)
    assert "good" in terminal.getvalue()
    assert is_tame(terminal.getvalue())
