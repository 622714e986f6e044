"""What a person sees on a terminal, and what they do not see elsewhere."""

from dataclasses import replace

import pytest

from tests.e2e.cli import Cli
from tests.e2e.conftest import STORY, Cluster
from tests.e2e.terminal import COLOUR, on_terminal


@pytest.fixture
def person(cluster: Cluster) -> Cli:
    """Somebody at a terminal that has colours."""
    return replace(cluster.cli, environment={**cluster.cli.environment, "TERM": "xterm-256color"})


def test_a_deployment_shows_a_bar_for_each_stage(person: Cli) -> None:
    try:
        with on_terminal(person, "deploy", STORY, "--name", "seen", "--stages", 3, "--ctx", 256) as terminal:
            seen = terminal.read_to_end()
        assert terminal.process.returncode == 0
        for stage in range(3):
            assert f"stage {stage}  layers" in seen
        assert "━" in seen
        assert "\x1b[" in seen
        assert "seen is ready after" in seen
    finally:
        replace(person, inside=True)("undeploy", "seen")


def test_colours_and_who_does_not_want_them(person: Cli) -> None:
    with on_terminal(person, "status") as terminal:
        assert COLOUR.search(terminal.read_to_end())
    colourless = replace(person, environment={**person.environment, "NO_COLOR": "1"})
    with on_terminal(colourless, "status") as terminal:
        seen = terminal.read_to_end()
    assert STORY in seen
    assert not COLOUR.search(seen)
    dumb = replace(person, environment={**person.environment, "TERM": "dumb"})
    with on_terminal(dumb, "deploy", STORY, "--name", "plain", "--stages", 2, "--ctx", 256) as terminal:
        seen = terminal.read_to_end()
    replace(person, inside=True)("undeploy", "plain")
    assert "stage 1  layers 3-5" in seen
    assert "\x1b" not in seen


def test_an_answer_says_how_fast_it_came(person: Cli) -> None:
    with on_terminal(person, "run", STORY, "Hello", "-n", 8) as terminal:
        assert "8 tokens, first after" in terminal.read_to_end()


def test_a_conversation(person: Cli) -> None:
    with on_terminal(person, "chat", STORY, "--temperature", 0, "--max-tokens", 8) as terminal:
        terminal.read_until("> ")
        terminal.type("Hello\n")
        assert "Hello!" in terminal.read_until("per second")
        terminal.read_until("> ")
        terminal.type("/what\n")
        assert "/bye" in terminal.read_until("> ")
        terminal.type("\x04")  # Ctrl-D
        terminal.read_to_end()
    assert terminal.process.returncode == 0


def test_ctrl_c_stops_an_answer_and_then_the_conversation(person: Cli) -> None:
    for _ in range(10):  # an answer may end before it is stopped, and then Ctrl-C ends the conversation
        with on_terminal(person, "chat", STORY, "--temperature", 1.5) as terminal:
            terminal.read_until("> ")
            terminal.type("Tell me a long story\n")
            terminal.read_until("story\r\n")
            terminal.read_until(" ")
            terminal.type("\x03")
            seen = terminal.read_until("> ")
            terminal.type("\x03")
            seen += terminal.read_to_end()
        assert "Traceback" not in seen
        assert terminal.process.returncode == 130
        if "stopped" in seen:
            return
    pytest.fail("no answer was stopped")


def test_errors_are_one_line_on_a_terminal_too(person: Cli) -> None:
    with on_terminal(person, "run", "nope", "Hello") as terminal:
        seen = terminal.read_to_end()
    assert seen.startswith("error: ")
    assert seen.count("\n") == 1
    assert terminal.process.returncode == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("eldric-cli undep", ["undeploy"]),
        (f"eldric-cli run {STORY[:2]}", [STORY]),
        ("eldric-cli models show st", [STORY]),
        ("eldric-cli deploy llama-7", ["llama-70b"]),
        ("eldric-cli deploy x --workers worker-1,worker-", ["worker-1,worker-2", "worker-1,worker-3"]),
        ("eldric-cli run --dir nowhere s", []),
        ("eldric-cli logs r", ["router"]),
        (f"eldric-cli models replicate {STORY} --to d", ["data"]),
        ("eldric-cli models repl", ["replicate"]),
    ],
)
def test_the_shell_completes_names(cluster: Cluster, line: str, expected: list[str]) -> None:
    words = line.split(" ")
    asking = {"_ELDRIC_CLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = replace(cluster.cli, environment={**cluster.cli.environment, **asking})()
    assert done.out.split() == expected
    assert done.err == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_too(cluster: Cluster, shell: str) -> None:
    line = {"_TYPER_COMPLETE_ARGS": f"eldric-cli run {STORY[:2]}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asking = {"_ELDRIC_CLI_COMPLETE": f"complete_{shell}", **line}
    done = replace(cluster.cli, environment={**cluster.cli.environment, **asking})()
    assert STORY in done.out
    assert done.err == ""
