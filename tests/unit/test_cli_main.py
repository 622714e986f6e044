"""eldric-cli as a whole: its table of commands, its errors, and what it imports."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from eldric import __version__
from eldric.cli import commands, failures, interrupts, main, options
from eldric.errors import NotEnoughMemory

HEAVY = (
    "grpc",
    "google.protobuf",
    "cryptography",
    "numpy",
    "zmq",
    "starlette",
    "uvicorn",
    "psutil",
    "rich",
    "eldric.v1",
)


def leaves() -> Iterator[tuple[str, Any]]:
    """Every command, with those of groups."""
    for name in commands.COMMANDS:
        command = commands.load(name)
        for sub, each in getattr(command, "commands", {"": command}).items():
            yield f"{name} {sub}".strip(), each


def imported_by(*arguments: str) -> set[str]:
    """Modules that a command has imported when it ends."""
    script = "import sys; from eldric.cli.main import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    modules = imported_by("--help")
    assert "eldric.cli.commands" in modules
    assert sorted(set(HEAVY) & modules) == []


def test_no_command_but_those_of_nodes_imports_ggml() -> None:
    named = {module for module, _ in commands.COMMANDS.values()} - {"nodes"}
    script = f"import sys, importlib; [importlib.import_module('eldric.cli.' + name) for name in {sorted(named)}]"
    script += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if name.startswith("eldric.engine.ggml")] == []


def test_the_table_says_what_the_commands_say() -> None:
    for name, (_, line) in commands.COMMANDS.items():
        command = commands.load(name)
        first = inspect.cleandoc(command.help).split("\n\n")[0].replace("\n", " ")
        assert first.startswith(line), name


def test_every_command_speaks_json() -> None:
    silent = [name for name, command in leaves() if not any("--json" in each.opts for each in command.params)]
    assert silent == []


def test_every_option_is_explained() -> None:
    mute = [
        (name, each.name) for name, command in leaves() for each in command.params if not getattr(each, "help", None)
    ]
    assert mute == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"eldric {__version__}\n"


def test_what_is_elsewhere_is_there() -> None:
    known = {name for name, _ in leaves()}
    assert set(commands.ELSEWHERE.values()) <= known
    assert not commands.ELSEWHERE.keys() & commands.COMMANDS.keys()
    in_models = {name.removeprefix("models ") for name in known if name.startswith("models ")}
    assert in_models <= commands.ELSEWHERE.keys()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in commands.COMMANDS if not re.search(rf"^  {name}\b", text, re.MULTILINE)] == []


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Usage: eldric-cli" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deplyo"], "no such command 'deplyo'. Did you mean 'deploy'"),
        (["deploy"], "missing argument"),
        (["deploy", "m", "--stages", "x"], "--stages"),
        (["token", "--uses", "-1"], "--uses"),
        (["status", "--wach"], "--watch"),
        (["models", "lss"], "Did you mean 'ls'"),
        (["ls"], "no such command 'ls'. Did you mean 'models ls'"),
        (["verify", "m"], "Did you mean 'models verify'"),
        (["models"], "missing command"),
        (["up", "--router-port", "70000"], "--router-port"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert words in said.err
    assert "--help`" in said.err


def test_what_is_no_text_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """As Python gives an argument that its locale's encoding does not know."""
    assert main.run(["run", "m", "caf\udcc3\udca9"]) == 1
    assert capsys.readouterr().err.startswith(r"error: 'caf\udcc3\udca9' is no text in this locale's encoding")


def test_wrong_usage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["deploy", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert "missing argument" in error["message"]


def breaking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Put a command into the table that fails like this."""
    app = options.new_app()

    @app.command("break")
    def command(text: str = "", as_json: options.Json = False) -> None:
        raise error

    monkeypatch.setitem(commands.COMMANDS, "break", ("", "Fails."))
    monkeypatch.setattr(commands, "load", lambda name: typer.main.get_group(app).commands[name])


def test_an_error_is_one_line_and_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, NotEnoughMemory("12 bytes\nare missing"))
    assert main.run(["break"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: 12 bytes are missing\n")
    assert main.run(["break", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"error": {"code": "RESOURCE_EXHAUSTED", "message": "12 bytes are missing"}}
    assert said.err == "error: 12 bytes are missing\n"


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_shows_the_traceback_wherever_it_stands(
    place: int, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, NotEnoughMemory("too big"))
    arguments = ["break"]
    arguments.insert(place, flag)
    assert main.run(arguments) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: too big\n")


def test_what_stands_after_two_dashes_is_no_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, NotEnoughMemory("too big"))
    assert main.run(["break", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_a_fault_of_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    breaking(monkeypatch, KeyError("x"))
    assert main.run(["break", "--json"]) == 1
    said = capsys.readouterr()
    assert "fault of the program: KeyError" in said.err
    assert json.loads(said.out)["error"]["code"] == "INTERNAL"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "PERMISSION_DENIED"),
        (FileNotFoundError(2, "No such file or directory", "/x/y"), "NOT_FOUND"),
        (OSError(28, "No space left on device", "/x/y"), "RESOURCE_EXHAUSTED"),
        (OSError(5, "Input/output error", "/x/y"), "INTERNAL"),
    ],
)
def test_errors_of_the_system_name_the_file(error: OSError, code: str) -> None:
    failure = failures.failure_of(error)
    assert failure.code == code
    assert failure.message == f"/x/y: {error.strerror}"


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    breaking(monkeypatch, KeyboardInterrupt())
    assert main.run(["break"]) == 130
    assert capsys.readouterr() == ("", "")
    assert main.run(["break", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "CANCELLED"


def test_a_deferred_interrupt_comes_after_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("rest of the block")
    assert done == ["rest of the block"]


def test_a_termination_runs_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, interrupts.as_exceptions():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
