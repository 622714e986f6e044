"""The commands and options that the documents, the contracts and the program's own advice name: there are such."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eldric.cli import commands
from tests.unit.test_cli_main import leaves

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("protos/eldric/v1/*.proto")),
    *(path for folder in ("cli", "eldric", "engine", "transport") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))),
]
#: A command in a code span or at the beginning of a line, up to its end.
COMMAND = re.compile(r"(?:`|^ *)eldric-cli ([a-z][^`\n\"#]*)", re.MULTILINE)
#: A backticked command without its program's name, as docs/cli.md writes them.
SHORT = re.compile(r"`((?:" + "|".join(sorted(commands.COMMANDS)) + r") [^`\n]*)`")
OPTION = re.compile(r"--?[a-z][a-z-]*")


def named(path: Path) -> Iterator[str]:
    text = path.read_text()
    yield from (found.strip() for found in COMMAND.findall(text))
    if path.name == "cli.md":
        yield from SHORT.findall(text)


def options_of(command: Any) -> set[str]:
    return {spelling for each in command.params for spelling in (*each.opts, *each.secondary_opts)} | {"--help"}


def test_every_command_and_option_that_is_named_is_there() -> None:
    known = dict(leaves())
    everywhere = {"-v", "--verbose"}
    wrong = []
    for path in SOURCES:
        for line in named(path):
            words = re.split(r"[\s{}()|,;:]+", line)
            name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
            if name not in known and name not in commands.COMMANDS:
                wrong.append(f"{path.name}: eldric-cli {line}")
            elif name in known:
                unknown = set(filter(OPTION.fullmatch, words)) - options_of(known[name]) - everywhere
                wrong += [f"{path.name}: eldric-cli {name} has no {each}" for each in sorted(unknown)]
    assert wrong == []


def test_the_reference_names_every_command() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/cli.md", "docs/nfs.md", "docs/edge.md"))
    silent = [name for name in commands.COMMANDS if not re.search(rf"(?:eldric-cli |`){name}\b", text)]
    assert silent == []


def test_no_line_of_help_is_cut_short() -> None:
    cut = []
    for name in commands.COMMANDS:
        group = commands.load(name)
        for sub, each in getattr(group, "commands", {}).items():
            if each.get_short_help_str(60).endswith("..."):
                cut.append(f"{name} {sub}: {each.get_short_help_str(60)}")
    assert cut == []


def test_the_line_of_a_group_names_its_commands() -> None:
    group = commands.load("models")
    words = {"ls": "list", "rm": "remove"}
    assert [name for name in group.commands if words.get(name, name) not in group.help] == []
