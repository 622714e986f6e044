"""Clusters come up once, come back, and end without a trace; so does what a person interrupts."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eldric.names import split_address
from tests.e2e.cli import Cli, ending, interrupt, running, wait_for
from tests.e2e.conftest import STORY, Cluster
from tests.models import storyteller


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a test's own cluster lies."""
    place = tmp_path / "cluster"
    with ending(place):
        yield place


def pids(up: dict[str, Any]) -> dict[str, int]:
    return {node["name"]: node["pid"] for node in up["nodes"]}


def ports_of(up: dict[str, Any]) -> list[int]:
    addresses = [node["grpc_address"] for node in up["nodes"]] + [node["http_url"] for node in up["nodes"]]
    return [int(address.rpartition(":")[2]) for address in addresses]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_cluster_comes_up_once_comes_back_and_ends_without_a_trace(home_cli: Cli, folder: Path) -> None:
    up = ("up", "--dir", folder, "--json")
    first = home_cli(*up, "--workers", 1).json
    assert sorted(running(folder).values()) == sorted(pids(first).values())
    assert home_cli(*up).json == first

    at = ("--dir", folder)
    home_cli("deploy", storyteller(), *at)
    name = storyteller().stem

    os.kill(pids(first)["worker-1"], signal.SIGKILL)
    os.kill(pids(first)["router"], signal.SIGKILL)
    both = [home_cli.start(*up), home_cli.start(*up, "--workers", 1)]
    second, other = (json.loads(process.communicate(timeout=60)[0]) for process in both)
    assert second == other
    assert {name for name, pid in pids(second).items() if pid != pids(first)[name]} == {"worker-1", "router"}

    inside = replace(home_cli, inside=True)
    wait_for(lambda: inside("status", *at, "--json").json["pipelines"][0]["state"] == "ready")
    assert len(inside("run", name, "Hello", "-n", 4, *at, "--json").json["tokens"]) == 4

    refused = home_cli("up", "--dir", folder, "--workers", 2, code=1)
    assert "cluster of 1 workers" in refused.error
    assert "other settings" in home_cli("up", "--dir", folder, "--threads", 5, code=1).error

    down = home_cli("down", "--dir", folder, "--json").json
    assert down == {"dir": str(folder), "stopped": 4, "killed": []}
    assert running(folder) == {}
    assert [port for port in ports_of(second) if not is_free(port)] == []
    assert list(folder.glob("*/node.json")) == []
    assert home_cli("down", "--dir", folder).out == "nothing was running\n"


def test_a_strangers_handshake_leaves_no_line_on_stderr(home_cli: Cli, folder: Path) -> None:
    up = home_cli("up", "--workers", 1, "--dir", folder, "--json").json
    addresses = {node["name"]: split_address(node["grpc_address"]) for node in up["nodes"]}
    for address in addresses.values():
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while stranger.recv(4096):
                pass
    assert {name: (folder / name / "output").read_text() for name in addresses} == dict.fromkeys(addresses, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_no_process(home_cli: Cli, folder: Path, number: int) -> None:
    with home_cli.start("up", "--workers", 1, "--dir", folder) as process:
        assert process.stderr is not None
        while "worker-1" not in (line := process.stderr.readline()):
            assert line, process.communicate()
        done = interrupt(process, number)
    assert done.code == 128 + number
    assert (done.out, done.err) == ("", "")
    assert running(folder) == {}
    assert list(folder.glob("*/node.json")) == []


def test_up_takes_over_what_a_killed_up_left_behind(home_cli: Cli, folder: Path) -> None:
    process = home_cli.start("up", "--workers", 1, "--dir", folder)
    wait_for(lambda: len(running(folder)) == 4)
    interrupt(process, signal.SIGKILL)
    left = running(folder)
    again = home_cli("up", "--workers", 1, "--dir", folder, "--json").json
    assert sorted(pids(again).values()) == sorted(left.values()) == sorted(running(folder).values())
    assert home_cli("down", "--dir", folder, "--json").json["stopped"] == 4


@pytest.mark.parametrize("beside", [0, 1000], ids=["http", "grpc"])
def test_a_router_port_in_use_is_said_before_anything_starts(home_cli: Cli, folder: Path, beside: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = home_cli("up", "--workers", 1, "--dir", folder, "--router-port", port - beside, "--json", code=1)
    assert f"127.0.0.1:{port} is in use" in done.error
    assert "--router-port" in done.error
    assert done.json["error"]["code"] == "ALREADY_EXISTS"
    assert running(folder) == {}


def test_a_node_that_dies_while_it_starts_has_the_last_word(home_cli: Cli, folder: Path, tmp_path: Path) -> None:
    broken = replace(home_cli, environment={"ELDRIC_GGML_DIR": str(tmp_path)})
    done = broken("up", "--workers", 1, "--dir", folder, code=1)
    assert done.error.startswith("worker worker-1 ended with exit code 1 while it started: ")
    assert "ggml" in done.error
    assert running(folder) == {}
    assert list(folder.glob("*/node.json")) == []
    doctor = broken("doctor", "--dir", folder, "--json", code=1).json
    assert any(each["check"] == "ggml" and each["level"] == "problem" for each in doctor["checks"])


def test_impossible_clusters(home_cli: Cli, folder: Path) -> None:
    inside = replace(home_cli, inside=True)
    assert "0 workers" in inside("up", "--workers", 0, "--dir", folder, code=1).error
    assert "amount of memory" in inside("up", "--memory", "much", "--dir", folder, code=1).error
    file = folder.parent / "file"
    file.write_text("")
    assert str(file) in inside("up", "--dir", file, code=1).error


# On the shared cluster


def test_an_interrupted_deployment_is_undone(cluster: Cluster) -> None:
    before = sum(memory_used(cluster))
    large = ("--stages", 1, "--ctx", 100_000, "--slots", 2)  # takes a while
    with cluster.cli.start("deploy", STORY, "--name", "half", *large) as process:
        assert process.stderr is not None
        while "mapping" not in process.stderr.readline():
            pass
        done = interrupt(process)
    assert (done.code, done.out) == (130, "")
    assert done.err.endswith("undoing the deployment\n")
    assert [each["name"] for each in cluster.cli("status", "--json").json["pipelines"]] == [STORY]
    wait_for(lambda: sum(memory_used(cluster)) == before)


def memory_used(cluster: Cluster) -> list[int]:
    inside = replace(cluster.cli, inside=True)
    return [worker["memory_used_bytes"] for worker in inside("workers", "--json").json["workers"]]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_an_interrupted_generation_is_cancelled(cluster: Cluster, options: tuple[str, ...]) -> None:
    inside = replace(cluster.cli, inside=True)

    def slots_used() -> int:
        return int(inside("status", "long", "--json").json["pipelines"][0]["slots_used"])

    inside("deploy", STORY, "--name", "long", "--stages", 1, "--ctx", 100_000, "--slots", 1)
    try:
        with cluster.cli.start("run", "long", "Once", "--raw", "--ignore-eos", *options) as process:
            wait_for(slots_used)
            done = interrupt(process)
        assert done.code == 130
        assert done.err == ""
        if options:
            assert done.json == {"error": {"code": "CANCELLED", "message": "interrupted"}}
        else:
            assert done.out.endswith("\n") or not done.out
        wait_for(lambda: not slots_used())
    finally:
        inside("undeploy", "long")


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_goes_away_is_no_error(cluster: Cluster, options: tuple[str, ...]) -> None:
    with cluster.cli.start("status", "--watch", *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr.read() == ""


def test_watching_ends_with_ctrl_c(cluster: Cluster) -> None:
    with cluster.cli.start("status", "--watch") as process:
        assert process.stdout is not None
        assert STORY in process.stdout.readline()
        done = interrupt(process)
    assert (done.code, done.err) == (130, "")
