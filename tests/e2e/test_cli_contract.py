"""What scripts rely on: commands, their JSON, their exit codes."""

import json
import os
import re
from typing import Any

import httpx
import pytest

from tests.e2e.cli import Cli
from tests.e2e.conftest import STORY, Cluster
from tests.models import storyteller

GREEDY = ("--raw", "--temperature", 0, "--max-tokens", 16)


def is_alive(pid: object) -> bool:
    assert isinstance(pid, int)
    os.kill(pid, 0)
    return True


def test_up_names_the_nodes_and_the_router(cluster: Cluster) -> None:
    up = cluster.up
    assert up["dir"] == str(cluster.folder)
    names = [node["name"] for node in up["nodes"]]
    assert names == ["controller", "data", "router", "worker-1", "worker-2", "worker-3"]
    assert all(is_alive(node["pid"]) for node in up["nodes"])
    models = httpx.get(f"{up['router_url']}/v1/models").json()
    assert STORY in [model["id"] for model in models["data"]]


def test_status(cluster: Cluster) -> None:
    pipelines = {each["name"]: each for each in cluster.cli("status", "--json").json["pipelines"]}
    pipeline = pipelines[STORY]
    assert (pipeline["model"], pipeline["state"], pipeline["epoch"]) == (STORY, "ready", 1)
    stages: list[dict[str, Any]] = pipeline["stages"]
    assert [stage["index"] for stage in stages] == [0, 1, 2]
    assert len({stage["worker"] for stage in stages}) == 3
    ends = [0, *(stage["layers"][1] for stage in stages)]
    assert [stage["layers"][0] for stage in stages] == ends[:-1]
    assert ends[-1] == 6
    for stage in stages:
        assert is_alive(stage["pid"])
        assert stage["memory_bytes"] > 0
        assert stage["step_ms"] >= 0
        link = stage["link"]
        assert link["to_stage"] == (stage["index"] + 1) % 3
        assert link["transport"] and link["encryption"] != "none" and not link["fallback"] and not link["closed"]
        assert link["frames"] >= 0 and link["bytes"] >= 0 and link["queue_frames"] >= 0 and link["queue_bytes"] >= 0
        assert link["round_trip_ms"] < 1000
    (again,) = cluster.cli("status", STORY, "--json").json["pipelines"]
    for each in (*stages, *again["stages"]):
        del each["link"]["round_trip_ms"]  # it is measured again and again
    assert again == pipeline


def test_workers(cluster: Cluster) -> None:
    workers = cluster.cli("workers", "--json").json["workers"]
    assert sorted(worker["name"] for worker in workers) == ["worker-1", "worker-2", "worker-3"]
    for worker in workers:
        assert is_alive(worker["pid"])
        assert worker["state"] == "up"
        assert worker["devices"]
        assert worker["memory_bytes"] > worker["memory_used_bytes"] >= 0


def test_run(cluster: Cluster) -> None:
    answer = cluster.cli("run", STORY, "Once upon a time", *GREEDY, "--json").json
    assert len(answer["tokens"]) == 16
    assert all(isinstance(token, int) for token in answer["tokens"])
    assert answer["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 16
    assert usage["prompt_tokens"] + 16 == usage["total_tokens"]
    assert all(answer["timings"][name] >= 0 for name in ("queue_ms", "prompt_ms", "generation_ms"))
    assert answer["text"].strip()


def test_run_for_people_writes_the_same_text(cli: Cli) -> None:
    whole = cli("run", STORY, "Once upon a time", *GREEDY, "--json").json["text"]
    done = cli("run", STORY, "-", *GREEDY, text="Once upon a time")
    assert done.out == f"{whole}\n"
    assert done.err == ""


def test_run_uses_the_chat_template_unless_it_is_raw(cli: Cli) -> None:
    raw = cli("run", STORY, "Hello", "--raw", "--temperature", 0, "-n", 1, "--json").json
    chat = cli("run", STORY, "Hello", "--temperature", 0, "-n", 1, "--json").json
    assert chat["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"]


def test_the_same_seed_gives_the_same_answer(cli: Cli) -> None:
    sampled = ("run", STORY, "Once", "--raw", "--temperature", 1.5, "-n", 24, "--json")
    first, again, other = (cli(*sampled, "--seed", seed).json["tokens"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_stop(cli: Cli) -> None:
    answer = cli("run", STORY, "Once upon a time", "--raw", "--temperature", 0, "--stop", "named", "--json").json
    assert answer["finish_reason"] == "stop"
    assert "named" not in answer["text"]


def test_deploy_and_undeploy(cluster: Cluster) -> None:
    cli = cluster.cli
    plan = cli("deploy", STORY, "--name", "two", "--stages", 2, "--dry-run", "--json").json["plan"]
    assert [stage["index"] for stage in plan["stages"]] == [0, 1]
    deployed = cli("deploy", STORY, "--name", "two", "--stages", 2, "--ctx", 256, "--slots", 1, "--json")
    assert deployed.err == ""
    pipeline = deployed.json["pipeline"]
    assert (pipeline["name"], pipeline["model"], pipeline["state"]) == ("two", STORY, "ready")
    assert len(pipeline["stages"]) == 2
    assert (pipeline["context"], pipeline["slots"]) == (256, 1)
    one, two = (cli("run", name, "A fox", *GREEDY, "--json").json["tokens"] for name in (STORY, "two"))
    assert one == two
    assert cli("undeploy", "two", "--json").json == {"undeployed": "two"}
    assert "two" not in [each["name"] for each in cli("status", "--json").json["pipelines"]]


@pytest.mark.parametrize("limit", [0, -1])
def test_max_tokens_that_limit_nothing(cli: Cli, limit: int) -> None:
    limited, free = (
        cli("run", STORY, "Once upon", "--raw", "--temperature", 0, *options, "--json").json
        for options in (("--max-tokens", limit), ())
    )
    assert limited["tokens"] == free["tokens"]
    assert len(free["tokens"]) > 16


def test_the_model_store(cli: Cli) -> None:
    added = cli("models", "add", storyteller(), "--name", "again", "--json").json["model"]
    assert (added["name"], added["layers"], added["architecture"]) == ("again", 6, "llama")
    assert "again" in [model["name"] for model in cli("models", "ls", "--json").json["models"]]
    shown = cli("models", "show", "again", "--json").json
    assert (shown["info"]["name"], shown["hidden_size"]) == ("again", 256)
    assert cli("models", "verify", "again", "--json").json == {"model": "again", "sound": True}
    assert cli("models", "rm", "again", "--json").json == {"removed": "again"}
    assert "again" not in [model["name"] for model in cli("models", "ls", "--json").json["models"]]


def test_ps(cli: Cli) -> None:
    found = cli("ps", "--json").json
    kinds = sorted(node["kind"] for node in found["nodes"])
    assert kinds == ["controller", "data", "router", "worker", "worker", "worker"]
    assert all(node["state"] == "up" for node in found["nodes"])
    assert STORY in [pipeline["name"] for pipeline in found["pipelines"]]


def test_logs(cli: Cli) -> None:
    found = cli("logs", "worker-1", "--lines", 3, "--json").json["logs"]
    assert list(found) == ["worker-1"]
    assert 1 <= len(found["worker-1"]) <= 3
    assert cli("logs", "worker-1", "-n", 1).out.startswith("worker-1: ")


def test_doctor_finds_nothing_wrong_with_the_cluster(cli: Cli) -> None:
    found = cli("doctor", "--json", code=None).json
    problems = [each for each in found["checks"] if each["level"] == "problem"]
    assert problems == []
    names = {each["check"] for each in found["checks"]}
    assert {
        "python",
        "packages",
        "ggml",
        "memory",
        "disk",
        "controller",
        "nodes",
        "health",
        "protocol",
        "clock",
        "certificates",
        "pipelines",
        "model store",
        "processes",
        "locked memory",
        "open files",
        "ports",
    } <= names


def test_chat_with_json_is_an_object_a_line(cli: Cli) -> None:
    done = cli(
        "chat", STORY, "--temperature", 0, "--max-tokens", 8, "--json", text="Hello\n\n/new\nHello\n/bye\nmore\n"
    )
    first, again = map(json.loads, done.out.splitlines())
    assert first["tokens"] == again["tokens"]
    assert first["usage"]["completion_tokens"] == 8


def test_a_conversation_remembers(cli: Cli) -> None:
    done = cli("chat", STORY, "--temperature", 0, "--max-tokens", 8, "--json", text="Hello\nHello\n")
    first, second = map(json.loads, done.out.splitlines())
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 8


def test_a_join_token(cli: Cli) -> None:
    made = cli("token", "--lifetime", "30m", "--uses", 2, "--kind", "worker", "--json").json
    assert made["token"].startswith("eldric.")
    assert (made["lifetime_s"], made["uses"], made["kind"]) == (1800, 2, "worker")
    assert made["join_address"]


def test_tables_for_people(cli: Cli) -> None:
    status = cli("status").out
    assert re.search(r"^0 > 1 +worker-2 +(zmq +curve|shm +one host) ", status, re.MULTILINE), status
    assert "worker-3" in cli("workers").out
    assert "router" in cli("ps").out
    assert "story" in cli("models", "ls").out
    assert "hidden size" in cli("models", "show", STORY).out
    assert "no problem" in cli("doctor", code=None).out
    plan = cli("deploy", STORY, "--name", "x", "--stages", 3, "--dry-run").out
    assert "KV cache" in plan
    assert not any("\x1b" in cli(command).out for command in ("status", "workers", "ps"))
