"""Pulling models by the command line: from a hub of the test's own, by a cluster of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eldric.client import Client, ImportProgress, ModelInfo, ResolvedSource
from eldric.errors import NotFound
from tests.e2e.cli import Cli, ending, interrupt, wait_for
from tests.hubs import FakeHub, serving_hub
from tests.models import storyteller
from tests.ollamas import SHA256, Ollama

REPOSITORY = "someone/Tale-5M-GGUF"
SIZE = storyteller().stat().st_size
NAMES = f'[tale]\nrepository = "{REPOSITORY}"\nquantization = "Q8_0"\n'


@dataclass(frozen=True, slots=True)
class Place:
    """A cluster whose data worker knows one hub, and a person with a short name of their own."""

    folder: Path
    cli: Cli
    hub: FakeHub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, home = tmp_path_factory.mktemp("cluster"), tmp_path_factory.mktemp("home")
    (home / ".config" / "eldric").mkdir(parents=True)
    (home / ".config" / "eldric" / "models.toml").write_text(NAMES)
    with serving_hub() as hub, ending(folder):
        hub.add(REPOSITORY, {"Tale-5M-Q8_0.gguf": storyteller(), "Tale-5M-Q2_K.gguf": b"other", "README.md": b"!"})
        ollama = Ollama(home / "ollama")
        ollama.tag("library/tale/5m", ollama.layer)
        environment = {
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1,localhost",
            "OLLAMA_MODELS": str(ollama.folder),
            "ELDRIC_DIR": str(folder),
        }
        cli = Cli(home, environment)
        cli("up", "--workers", 1, "--threads", 1, "--dir", folder)
        yield Place(folder, cli, hub)
        cli("down")


@pytest.fixture(autouse=True)
def empty_store(place: Place) -> Iterator[None]:
    place.hub.stall_at = -1
    place.hub.go_on.clear()
    place.hub.reached.clear()
    yield
    place.hub.go_on.set()
    inside = replace(place.cli, inside=True)
    for name in ("tale", "Tale-5M-Q8_0", "tale:5m"):
        inside("undeploy", name, code=None)
        inside("models", "rm", name, code=None)


def test_a_pull_shows_what_a_short_name_turned_out_to_be(place: Place) -> None:
    done = place.cli("models", "pull", "tale")
    assert done.out == f"tale: llama, 6 layers, {SIZE / (1 << 20):.1f} MiB\n"
    lines = done.err.splitlines()
    assert lines[0] == f"tale is hf://{REPOSITORY}:Q8_0: 1 file, {SIZE / (1 << 20):.1f} MiB"
    assert all(line.startswith("tale  downloading ") for line in lines[1:])
    assert place.cli("models", "verify", "tale", "--json").json["sound"]


def test_a_pull_with_json_is_one_object(place: Place) -> None:
    done = place.cli("models", "pull", f"hf://{REPOSITORY}", "--quant", "q8_0", "--json")
    assert done.err == ""
    assert (done.json["model"]["name"], done.json["model"]["size_bytes"]) == ("Tale-5M-Q8_0", SIZE)
    assert done.json["resolved"] == {
        "source": f"hf://{REPOSITORY}:Q8_0",
        "name": "Tale-5M-Q8_0",
        "quantization": "Q8_0",
        "files": [["Tale-5M-Q8_0.gguf", SIZE]],
        "size_bytes": SIZE,
        "kept_bytes": 0,
        "problem": "",
    }


def test_deploying_a_model_that_is_not_in_the_store_pulls_it_first(place: Place) -> None:
    refused = place.cli("deploy", "tale", "--dry-run", code=1)
    assert f"gets it from hf://{REPOSITORY}:Q8_0" in refused.error
    done = place.cli("deploy", "tale", "--ctx", 256, "--slots", 1)
    assert f"tale is hf://{REPOSITORY}:Q8_0: 1 file" in done.err and "stage 0" in done.err
    assert "tale is ready" in done.out
    assert place.cli("run", "tale", "A fox", "-n", 4, "--json").json["tokens"]
    before = len(place.hub.downloads)
    place.cli("deploy", "tale", "--name", "again", "--ctx", 256, "--slots", 1)
    place.cli("undeploy", "again")
    assert len(place.hub.downloads) == before


def test_what_the_hub_says_cannot_be_deployed_is_not_pulled_to_be_deployed(place: Place) -> None:
    place.hub.describe = lambda description: description | {"gguf": {"architecture": "mamba"}}
    place.hub.stall_at = 1 << 20  # so that what is pulled all the same cannot come whole
    inside = replace(place.cli, inside=True)
    try:
        error = inside("deploy", f"hf://{REPOSITORY}:Q8_0", code=1).error
        assert "cannot be deployed: architecture 'mamba' is not supported" in error
        assert inside("models", "ls", "--json").json == {"models": []}
        place.hub.go_on.set()
        assert "it cannot be deployed" in inside("models", "pull", f"hf://{REPOSITORY}:Q8_0").err
    finally:
        place.hub.describe = dict


def test_an_interrupted_pull_says_what_it_keeps_and_goes_on(place: Place) -> None:
    place.hub.stall_at = 2 << 20
    with place.cli.start("models", "pull", "tale") as process:
        assert place.hub.reached.wait(20)
        (partial,) = place.folder.rglob("partial/tale/tale.gguf")
        wait_for(lambda: partial.stat().st_size == 2 << 20)
        assert process.stderr is not None
        while "downloading" not in process.stderr.readline():
            pass
        done = interrupt(process)
    assert (done.code, done.out) == (130, "")
    assert "stopped: " in done.err and "are kept, the same command goes on from there" in done.err
    assert replace(place.cli, inside=True)("models", "ls", "--json").json == {"models": []}
    place.hub.stall_at = -1
    place.hub.go_on.set()
    again = place.cli("models", "pull", "tale")
    assert "of which 2.0 MiB are here already" in again.err
    assert place.hub.downloads[-1].range == f"bytes={2 << 20}-"


def test_a_model_of_ollama_is_deployed_without_a_copy(place: Place) -> None:
    place.cli("deploy", "ollama://tale:5m", "--name", "tale", "--ctx", 256, "--slots", 1)
    assert place.cli("run", "tale", "A fox", "-n", 4, "--json").json["tokens"]
    (path,) = place.folder.rglob("tale:5m.gguf")
    assert path.samefile(place.cli.home / "ollama" / "blobs" / f"sha256-{SHA256}")


def test_what_is_not_there_is_one_line(place: Place) -> None:
    cli = replace(place.cli, inside=True)
    for model, words in (
        ("hf://someone/nothing", "has no someone/nothing"),
        (f"hf://{REPOSITORY}:Q5_0", "no quantization Q5_0: it has Q2_K, Q8_0"),
        (f"hf://{REPOSITORY}:Q2_K", "not a GGUF file"),
        ("ollama://nothing", "Ollama has no nothing:latest"),
        ("eldric://127.0.0.1:9/x", "does not answer"),
    ):
        assert words in cli("models", "pull", model, code=1).error


def test_a_file_can_be_served_from_where_it_lies(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(storyteller().read_bytes())
    cli = replace(place.cli, inside=True)
    cli("models", "add", path, "--reference", "--name", "tale")
    place.cli("deploy", "tale", "--ctx", 256, "--slots", 1)
    assert place.cli("run", "tale", "A fox", "-n", 4, "--json").json["tokens"]
    cli("undeploy", "tale")
    path.write_bytes(path.read_bytes())
    assert "changed since it was referenced" in cli("models", "ls").out
    cli("models", "rm", "tale")
    assert path.exists()


def test_the_python_client_pulls_with_typed_events(place: Place) -> None:
    with Client(folder=place.folder) as client:
        events = list(client.models.pull_events(f"hf://{REPOSITORY}:Q8_0", "tale"))
        kinds = [type(event) for event in events]
        assert kinds.count(ResolvedSource) == 1 and kinds[-1] is ModelInfo and ImportProgress in kinds
        assert client.models.pull(f"hf://{REPOSITORY}:Q8_0", "tale").name == "tale"
        with pytest.raises(NotFound, match="has no someone/nothing"):
            client.models.pull("hf://someone/nothing")
