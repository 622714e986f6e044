"""Bad input everywhere a person can give some: one line that says what to do, and nothing left behind."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from eldric.cli.local import LocalCluster
from eldric.cli.roster import Shape
from tests.e2e.cli import Cli
from tests.e2e.conftest import STORY
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import as_unknown_architecture, damage


@pytest.mark.parametrize("command", [("undeploy",), ("status",), ("rebalance",), ("chat",), ("run", "hello")])
def test_an_unknown_pipeline(cli: Cli, command: tuple[str, ...]) -> None:
    name, *rest = command
    done = cli(name, "nope", *rest, "--json", code=1)
    assert done.error.startswith(("there is no pipeline 'nope'", "the model 'nope' is not deployed"))
    assert STORY in done.error
    error = done.json["error"]
    assert error == {"code": "NOT_FOUND", "message": done.error}


@pytest.mark.parametrize("command", [("models", "show"), ("models", "rm"), ("models", "verify")])
def test_an_unknown_model(cli: Cli, command: tuple[str, ...]) -> None:
    done = cli(*command, "nope", "--json", code=1)
    assert "no model 'nope'" in done.error
    assert done.json["error"]["code"] == "NOT_FOUND"


def test_a_model_that_is_nowhere(cli: Cli) -> None:
    assert "models add FILE" in cli("deploy", "nope", code=1).error
    assert "`eldric-cli models pull llama-70b` gets it" in cli("deploy", "llama-70b", "--dry-run", code=1).error
    assert "is no short name" in cli("models", "pull", "nope", code=1).error
    assert "names no source of models" in cli("models", "pull", "http://x/y.gguf", code=1).error
    assert "no file" in cli("deploy", "nope.gguf", code=1).error
    assert "no file" in cli("models", "add", "nope.gguf", code=1).error


def test_files_that_are_no_models(cli: Cli, tmp_path: Path) -> None:
    text, part = tmp_path / "text.gguf", tmp_path / "part.gguf"
    text.write_text("hello")
    part.write_bytes(storyteller().read_bytes()[:1000])
    for path in (text, part):
        for command in (("models", "add"), ("deploy",)):
            done = cli(*command, path, "--json", code=1)
            assert done.json["error"]["code"] == "INVALID_ARGUMENT"
            assert path.name in done.error
            assert "at byte" in done.error
    assert not {"text", "part"} & {model["name"] for model in cli("models", "ls", "--json").json["models"]}


def test_a_model_that_is_deployed_is_not_removed(cli: Cli) -> None:
    done = cli("models", "rm", STORY, "--json", code=1)
    assert f"`eldric-cli undeploy {STORY}` first" in done.error
    assert done.json["error"]["code"] == "FAILED_PRECONDITION"
    assert STORY in [model["name"] for model in cli("models", "ls", "--json").json["models"]]


def test_an_architecture_that_is_not_known(cli: Cli, tmp_path: Path) -> None:
    path = as_unknown_architecture(tmp_path / "snake.gguf", write_small_llama(tmp_path / "x.gguf", SmallLlama()))
    try:
        error = cli("deploy", path, code=1).error
        assert "'mamba' is not supported" in error
        assert "llama" in error
        assert "mamba" in cli("models", "ls").out
        cli("models", "rm", "snake")
        assert "cannot be deployed: architecture 'mamba'" in cli("models", "add", path).err
    finally:
        cli("models", "rm", "snake", code=None)


def test_a_file_of_another_model_with_a_name_of_the_store(cli: Cli, tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / f"{STORY}.gguf", SmallLlama())
    assert "another model" in cli("deploy", path, code=1).error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stages", 9), "6 layers"),
        (("--stages", -1), "stages cannot be -1"),
        (("--slots", 100_000), "slots is 100000"),
        (("--ctx", 1_000_000_000), "context"),
        (("--layers", "1,2"), "6 layers"),
        (("--layers", "1,x"), "list of numbers"),
        (("--weights", "funny"), "one of auto, mapped, repacked"),
        (("--kv-type", "q4"), "one of f16, f32"),
        (("--workers", "nobody"), "no worker 'nobody'"),
        (("--transport", "pigeon"), "pigeon"),
        (("--name", "a b"), "no name for a pipeline"),
        (("--slots", 1024, "--ctx", 100_000), "are missing"),
        (("--insecure-tensors",), "--allow-insecure-tensors"),
    ],
)
def test_a_deployment_that_cannot_be(cli: Cli, options: tuple[object, ...], words: str) -> None:
    done = cli("deploy", STORY, "--name", "wrong", *options, "--json", code=1)
    assert words in done.error
    assert done.json["error"]["message"] == done.error
    assert [each["name"] for each in cli("status", "--json").json["pipelines"]] == [STORY]


def test_a_name_that_is_taken(cli: Cli) -> None:
    assert cli("deploy", STORY, "--json", code=1).json["error"]["code"] == "ALREADY_EXISTS"
    assert (
        cli("models", "add", storyteller(), "--name", STORY, "--json", code=1).json["error"]["code"] == "ALREADY_EXISTS"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", -1), "temperature"),
        (("--top-p", 7), "top_p"),
        (("--min-p", 2), "min_p"),
        (("--top-k", -3), "top_k"),
        (("--seed", 2**65), "seed"),
        (("--max-tokens", 2**40), "max_tokens"),
        (("--max-tokens", -2), "max_tokens cannot be -2"),
        (("--raw", "--system", "be kind"), "--system"),
    ],
)
def test_sampling_out_of_range(cli: Cli, options: tuple[object, ...], words: str) -> None:
    done = cli("run", STORY, "Hello", *options, "--json", code=1)
    assert words in done.error
    assert done.json["error"]["code"] == "INVALID_ARGUMENT"


def test_a_prompt_that_is_longer_than_the_context(cli: Cli) -> None:
    done = cli("run", STORY, "-", "--json", code=1, text="word " * 2000)
    assert done.json["error"]["code"] == "INVALID_ARGUMENT"
    assert "512 tokens" in done.error


def test_a_conversation_goes_on_after_an_error(cli: Cli) -> None:
    done = cli("chat", STORY, "--max-tokens", 2, "--json", text=f"{'word ' * 2000}\nHello\n")
    first, second = map(json.loads, done.out.splitlines())
    assert first["error"]["code"] == "INVALID_ARGUMENT"
    assert second["usage"]["completion_tokens"] == 2
    spoken = cli("chat", STORY, "--max-tokens", 2, text=f"{'word ' * 2000}\n")
    assert spoken.err.startswith("error: ")


def test_a_cluster_that_is_not_there(home_cli: Cli, tmp_path: Path) -> None:
    home_cli = replace(home_cli, inside=True)
    assert "eldric-cli up" in home_cli("status", code=1).error
    assert "holds no cluster" in home_cli("status", "--dir", tmp_path, code=1).error
    assert "eldric-cli up" in home_cli("down", "--dir", tmp_path, code=1).error
    assert not list(tmp_path.iterdir())
    (tmp_path / "cluster.json").write_text("{")
    assert "cluster.json" in home_cli("status", "--dir", tmp_path, code=1).error
    assert "no address" in home_cli("status", "--controller", "somewhere", code=1).error
    assert "certificate" in home_cli("status", "--controller", "127.0.0.1:1", code=1).error


def test_a_cluster_that_does_not_run(home_cli: Cli, tmp_path: Path) -> None:
    home_cli = replace(home_cli, inside=True)
    cluster = LocalCluster.create(tmp_path, Shape(workers=1))
    cluster.controllers = ["127.0.0.1:1"]
    cluster.save()
    for command in (("status",), ("workers",), ("run", "m", "p"), ("models", "ls")):
        done = home_cli(*command, "--dir", tmp_path, code=1)
        assert f"`eldric-cli up --dir {tmp_path}`" in done.error
    doctor = home_cli("doctor", "--dir", tmp_path, "--json", code=1).json
    (problem,) = (each for each in doctor["checks"] if each["level"] == "problem")
    assert problem["advice"].startswith(f"`eldric-cli up --dir {tmp_path}`")


def test_a_command_that_is_advised_can_be_pasted_whatever_the_folder_is_called(home_cli: Cli, tmp_path: Path) -> None:
    home_cli = replace(home_cli, inside=True)
    folder = tmp_path / "my cluster's ü"
    advised = home_cli("down", "--dir", folder, code=1).error.partition("`")[2].partition("`")[0]
    assert shlex.split(advised) == ["eldric-cli", "up", "--dir", str(folder)]
    cluster = LocalCluster.create(folder, Shape(workers=1))
    cluster.controllers = ["127.0.0.1:1"]
    cluster.save()
    advised = home_cli("status", "--dir", folder, code=1).error.partition("`")[2].partition("`")[0]
    assert shlex.split(advised) == ["eldric-cli", "up", "--dir", str(folder)]


def test_options_of_this_machine(cli: Cli) -> None:
    assert "no node 'nobody'" in cli("logs", "nobody", code=1).error
    assert "kind of node" in cli("token", "--kind", "spy", code=1).error
    assert "30 days" in cli("token", "--lifetime", "99d", code=1).error
    assert "length of time" in cli("token", "--lifetime", "soon", code=1).error


def test_a_broken_table_of_short_names(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "eldric").mkdir()
    (tmp_path / "eldric" / "models.toml").write_text("[")
    broken = replace(cli, inside=False, environment={**cli.environment, "XDG_CONFIG_HOME": str(tmp_path)})
    assert "models.toml" in broken("deploy", "whatever", code=1).error
    assert broken("status").code == 0


def test_doctor_and_the_list_show_the_damage_that_verify_found(cli: Cli, tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "bad.gguf", SmallLlama())
    cli("models", "add", path)
    try:
        damage(Path(cli("models", "show", "bad", "--json").json["folder"]) / "bad" / "bad.gguf")
        assert "has the SHA-256" in cli("models", "verify", "bad", code=1).error
        (listed,) = [each for each in cli("models", "ls", "--json").json["models"] if each["name"] == "bad"]
        assert "bad.gguf is damaged" in listed["problem"]
        checks = cli("doctor", "--json", code=1).json["checks"]
        (found,) = [each for each in checks if each["check"] == "models"]
        assert "bad cannot be used: bad/bad.gguf is damaged" in found["message"]
        assert "is damaged" in cli("deploy", "bad", code=1).error
    finally:
        cli("models", "rm", "bad")


def test_a_cluster_of_this_folder_is_the_same_by_a_relative_path(cli: Cli) -> None:
    """Doctor looks for its processes by their folders."""
    folder = Path(cli.environment["ELDRIC_DIR"])
    relative = os.path.relpath(folder, cli.home.resolve())
    checks = cli("doctor", "--dir", relative, "--json", code=None).json["checks"]
    assert [each["level"] for each in checks if each["check"] == "processes"] == ["ok"]
