"""What commands write: JSON, tables, progress, generated text."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eldric.cli import generating, output, progress, tables
from eldric.cli.log_files import Follower, last_lines
from eldric.client import (
    Delta,
    Event,
    Finished,
    ImportProgress,
    LinkInfo,
    ModelInfo,
    NodeInfo,
    PipelineInfo,
    Plan,
    PlannedStage,
    PullEvent,
    ResolvedSource,
    StageProgress,
    Started,
    Token,
)
from eldric.errors import Unavailable
from tests.unit.test_cli_doctor import PIPELINE, WORKERS

MODEL = ModelInfo("tale", 6, 5, "gguf", "llama", "Q8_0", 4_860_000, 1024)
STAGES = tuple(PlannedStage(index, f"w{index}", (index * 3, index * 3 + 3), 100, 1, 1, 1000) for index in range(2))


def text_of(view: object) -> str:
    """A view as it is in a pipe."""
    console = Console(file=io.StringIO(), width=200)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def on_terminal(view: object, width: int) -> str:
    console = output._Console()
    console.file, console.width = io.StringIO(), width
    console.print(view)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_cuts_no_name_and_no_address(width: int) -> None:
    addresses = "10.11.12.13:9880", "https://10.11.12.13:8880"
    node = NodeInfo("controller-of-them-all", "controller", "up", 7, *addresses, "1", 1)
    text = on_terminal(tables.nodes_view([node]), width)
    assert {"controller-of-them-all", *addresses} <= set(text.split())
    assert text.count("\n") == 2, "the terminal wraps lines, the table does not"


def test_text_wraps_within_its_column_and_is_whole() -> None:
    listing = output.table("name", "right:size", "text:problem")
    listing.add_row("tale", "5", "its file is damaged, and a/path/that/is/longer/than/the/column.gguf says so")
    lines = on_terminal(listing, 40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join("".join(line[12:].split()) for line in lines[1:]).startswith(
        "itsfileisdamaged,anda/path/that/is/longer"
    )
    assert "…" not in "".join(lines)


def test_a_wide_terminal_is_not_filled() -> None:
    listing = output.table("name", "text:problem")
    listing.add_row("tale", "none")
    assert max(map(len, on_terminal(listing, 200).splitlines())) < 40


def test_progress_on_a_narrow_terminal_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    with progress.Tracker(quiet=False) as tracker:
        tracker.update("stage 11  layers 10-23  worker-of-them-all", "mapping", 50, 100)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "50%" in text and "mapping" in text and "worker-of-them-all" in text and "…" not in text


def test_sizes_that_nobody_knows_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    with progress.Tracker(quiet=False) as tracker:
        tracker.update("tale", "waiting")
    assert isinstance(console.file, io.StringIO)
    assert "waiting" in console.file.getvalue() and "?" not in console.file.getvalue().replace("\x1b[?25", "")


def test_json_is_one_line_with_the_names_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"pipelines": [PIPELINE], "workers": WORKERS, "text": "é\n"})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    document = json.loads(line)
    pipeline = document["pipelines"][0]
    assert {"name", "model", "state", "epoch", "stages"} <= pipeline.keys()
    assert {"index", "worker", "pid", "layers", "memory_bytes", "step_ms"} <= pipeline["stages"][0].keys()
    assert pipeline["stages"][1]["layers"] == [1, 2]
    assert {"name", "pid", "state", "devices", "memory_bytes", "memory_used_bytes"} <= document["workers"][0].keys()
    assert document["text"] == "é\n"


def test_pipelines_for_people() -> None:
    text = text_of(
        tables.pipelines_view([PIPELINE, replace(PIPELINE, name="two", message="a [b] c", state="degraded")])
    )
    assert "tale  ready  epoch 1" in text
    assert "two  model tale  degraded" in text
    assert "a [b] c" in text
    assert "transport" not in text  # nothing is known of its links


def test_links_for_people() -> None:
    first = LinkInfo(1, "zmq", "curve", 0.0512, 9, 3 << 20, 2, 2048, "ucx failed: not installed", "")
    back = LinkInfo(0, "ucx", "none", 0.0, 9, 512, 0, 0, "", "its connection closed")
    stages = tuple(replace(stage, link=link) for stage, link in zip(PIPELINE.stages, (first, back), strict=True))
    lines = text_of(tables.pipelines_view([replace(PIPELINE, stages=stages)])).splitlines()
    assert " ".join(lines[-2].split()) == "0 > 1 w2 zmq curve 0.0512 ms 3.0 MiB 2 (2.0 KiB) ucx failed: not installed"
    assert " ".join(lines[-1].split()) == "1 > 0 w1 ucx NONE 512 B 0 its connection closed"


@pytest.mark.parametrize(("view", "words"), [(tables.pipelines_view([]), "deploy"), (tables.workers_view([]), "join")])
def test_where_there_is_nothing_the_next_step_is_named(view: object, words: str) -> None:
    assert f"eldric-cli {words}" in text_of(view)


def test_names_are_sorted_as_people_count() -> None:
    workers = [replace(WORKERS[0], name=f"worker-{number}") for number in (10, 9, 1)]
    lines = text_of(tables.workers_view(workers)).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["worker-1", "worker-9", "worker-10"]
    nodes = [NodeInfo("n", kind, "up", 1, "", "", "", 1) for kind in ("worker", "edge", "new", "controller")]
    lines = text_of(tables.nodes_view(nodes)).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["controller", "edge", "worker", "new"]


@pytest.mark.parametrize(("layers", "text"), [((0, 10), "0-9"), ((4, 5), "4")])
def test_layers_are_named_first_and_last(layers: tuple[int, int], text: str) -> None:
    assert progress.layer_range(layers) == text


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stderr where that is no terminal."""
    buffer = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=buffer, width=200, highlight=False))
    return buffer


DEPLOYMENT = (
    Plan("tale", STAGES, {}),
    StageProgress(0, "w0", "mapping", 10, 100),
    StageProgress(0, "w0", "mapping", 90, 100),
    StageProgress(1, "w1", "mapping", 10, 0),
    StageProgress(0, "w0", "loaded", 0, 0),
)


def test_progress_elsewhere_than_on_a_terminal_is_a_line_for_each_change(said: io.StringIO) -> None:
    assert progress.follow_deploy([*DEPLOYMENT, PIPELINE], quiet=False) is PIPELINE
    assert said.getvalue().splitlines() == [
        "stage 0  layers 0-2  w0  waiting",
        "stage 1  layers 3-5  w1  waiting",
        "stage 0  layers 0-2  w0  mapping",
        "stage 1  layers 3-5  w1  mapping",
        "stage 0  layers 0-2  w0  loaded",
    ]


def test_progress_of_an_import(said: io.StringIO) -> None:
    events: list[ImportProgress | ModelInfo] = [*(ImportProgress("copying", done, 5) for done in (1, 5)), MODEL]
    assert progress.follow_import(events, "tale", quiet=False) is MODEL
    assert said.getvalue() == "tale  copying\n"


RESOLVED = ResolvedSource(
    "hf://o/r:Q4_K_M", "tale", "Q4_K_M", (("a.gguf", 3 << 30), ("b.gguf", 1 << 30)), 4 << 30, 1 << 30
)
PULL: list[PullEvent] = [
    ImportProgress("resolving", 0, 0),
    RESOLVED,
    *(ImportProgress("checking", done << 28, 4 << 30) for done in range(5)),
    *(ImportProgress("downloading", done << 28, 4 << 30) for done in range(4, 17)),
    MODEL,
]


def test_a_pull_says_what_it_is_and_a_line_every_tenth(said: io.StringIO) -> None:
    seen: list[PullEvent] = []
    assert progress.follow_pull(PULL, seen, quiet=False) == (RESOLVED, MODEL)
    assert seen == PULL
    lines = said.getvalue().splitlines()
    assert lines[0] == "tale is hf://o/r:Q4_K_M: 2 files, 4.0 GiB, of which 1.0 GiB are here already"
    assert lines[1:4] == ["tale  checking 0 %", "tale  checking 10 %", "tale  checking 20 %"]
    assert lines[4:] == [f"tale  downloading {tenth} %" for tenth in range(20, 101, 10)]


def test_a_pull_on_a_terminal_shows_how_fast_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=buffer, width=160, force_terminal=True, color_system=None))
    progress.follow_pull(PULL, [], quiet=False)
    last = [line for line in buffer.getvalue().splitlines() if "4.0/4.0 GiB" in line][-1]
    assert "tale" in last and "done" in last and ("/s" in last or "?" in last)  # "?": nothing took any time


def test_no_progress_beside_json(said: io.StringIO) -> None:
    assert progress.follow_deploy([*DEPLOYMENT, PIPELINE], quiet=True) is PIPELINE
    assert progress.follow_import([ImportProgress("copying", 1, 5), MODEL], "tale", quiet=True) is MODEL
    assert progress.follow_pull(PULL, [], quiet=True) == (RESOLVED, MODEL)
    assert said.getvalue() == ""


def test_a_stream_that_just_ends_is_an_error(said: io.StringIO) -> None:
    with pytest.raises(Unavailable):
        progress.follow_deploy(DEPLOYMENT, quiet=False)
    with pytest.raises(Unavailable):
        progress.follow_import([], "tale", quiet=False)
    with pytest.raises(Unavailable):
        progress.follow_pull([RESOLVED], [], quiet=False)


def test_progress_on_a_terminal_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=buffer, width=120, force_terminal=True, color_system="standard"))
    info: PipelineInfo = progress.follow_deploy([*DEPLOYMENT, PIPELINE], quiet=False)
    assert info is PIPELINE
    text = buffer.getvalue()
    assert "\x1b[" in text
    assert "━" in text
    assert "ready" in text


def events(*pieces: str) -> Iterator[Event]:
    yield Started("id", 3)
    for number, piece in enumerate(pieces):
        yield Delta(piece, (Token(number, piece.encode()),))
    yield Finished("stop", 3, len(pieces), 1.0, 2.0, 100.0)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [(("a", "b"), "ab\n"), (("a\n",), "a\n"), ((), ""), (("a", "\n", "b"), "a\nb\n"), (("", ""), "")],
)
def test_text_is_written_as_it_comes_and_ends_its_line(
    pieces: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    finished = generating.stream(events(*pieces), said)
    assert capsys.readouterr().out == text
    assert "".join(said) == "".join(pieces)
    assert finished.completion_tokens == len(pieces)


def test_text_that_breaks_off_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Event]:
        yield Delta("half", ())
        raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        generating.stream(broken(), said)
    assert capsys.readouterr().out == "half\n"
    assert said == ["half"]


def test_a_generation_as_an_object() -> None:
    assert generating.whole(events("a", "b", "c")) == {
        "text": "abc",
        "tokens": [0, 1, 2],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0, "total_tokens": 6},
        "timings": {"queue_ms": 1.0, "prompt_ms": 2.0, "generation_ms": 100.0, "tokens_per_second": 20.0},
    }


def test_speed_counts_from_the_first_token() -> None:
    finished = Finished("stop", 3, 11, 1.0, 2.0, 1000.0)
    assert generating.speed(finished) == 10
    assert generating.speed(replace(finished, generation_ms=0.0)) == 0
    assert generating.speed_line(finished) == "11 tokens, first after 3 ms, then 10.0 per second"
    assert generating.speed_line(replace(finished, completion_tokens=1)) == "1 tokens, first after 3 ms"


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log, 3) == []
    log.write_bytes(b"a\nb\xff\nc\n")
    assert last_lines(log, 2) == ["b\N{REPLACEMENT CHARACTER}", "c"]
    assert last_lines(log, 0) == []


def test_a_log_is_followed_over_its_rotation(tmp_path: Path) -> None:
    log = tmp_path / "log"
    follower = Follower(log)
    log.write_text("one\ntw")
    assert follower.new_lines() == ["one"]
    with log.open("a") as file:
        file.write("o\n")
    assert follower.new_lines() == ["two"]
    assert follower.new_lines() == []
    log.rename(tmp_path / "log.1")
    assert follower.new_lines() == []
    log.write_text("a new file, which is longer\n")
    assert follower.new_lines() == ["a new file, which is longer"]
    log.unlink()
    assert follower.new_lines() == []
