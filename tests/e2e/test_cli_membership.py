"""A cluster of several machines, which are folders here: init, token, join, and one command for each node."""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eldric.security import Identity
from tests.e2e.cli import Cli, interrupt, wait_for
from tests.models import storyteller


def free_ports() -> int:
    """An HTTP port whose + 1000 and + 2000 are free as well."""
    for port in range(20_000 + os.getpid() % 997, 60_000, 7):
        with contextlib.ExitStack() as probes:
            try:
                for number in (port, port + 1000, port + 2000):
                    probes.enter_context(socket.create_server(("127.0.0.1", number)))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@contextlib.contextmanager
def node(cli: Cli, *arguments: object) -> Iterator[dict[str, Any]]:
    """Run a node until the end of the block; what it says when it is ready."""
    with cli.start(*arguments, "--quiet", "--json", stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            assert interrupt(process).code == 0


@pytest.fixture
def operator(tmp_path: Path) -> Cli:
    """Somebody with a configuration of their own, who makes a cluster."""
    return person(tmp_path / "operator")


def person(home: Path) -> Cli:
    home.mkdir()
    return Cli(home, {"XDG_CONFIG_HOME": str(home / "config"), "XDG_DATA_HOME": str(home / "data")})


def test_machines_become_a_cluster(operator: Cli, tmp_path: Path) -> None:
    port = free_ports()
    made = operator("init", "test", "--host", "127.0.0.1", "--http-port", port, "--json").json
    assert made["join_address"] == f"127.0.0.1:{port + 2000}"
    assert f"eldric-cli controller --folder {made['folder']}" in made["command"]
    assert "already" in operator("init", "test", code=1).error

    machine, quick = person(tmp_path / "machine"), replace(operator, inside=True)
    with contextlib.ExitStack() as nodes:
        controller = nodes.enter_context(node(operator, "controller", "--folder", made["folder"], "--http-port", port))
        assert controller["grpc_address"] == made["controller"]

        for kind in ("data", "worker", "router"):
            joined = machine(
                "join", made["token"], made["join_address"], "--kind", kind, "--name", f"my-{kind}", "--json"
            ).json
            assert Identity.load(Path(joined["folder"])).node_id == f"{kind}/my-{kind}"
            assert (
                f"eldric-cli {kind} --folder {joined['folder']} --controller {made['controller']}" in joined["command"]
            )
            if kind == "worker":
                quick("models", "add", storyteller(), "--name", "story")
                assert "there is no worker" in quick("deploy", "story", code=1).error
            store = ("--models", tmp_path / "store") if kind == "data" else ()
            ready = nodes.enter_context(
                node(
                    machine,
                    kind,
                    "--folder",
                    joined["folder"],
                    "--controller",
                    made["controller"],
                    "--http-port",
                    0,
                    *store,
                )
            )
            assert (ready["kind"], ready["name"]) == (kind, f"my-{kind}")
            wait_for(lambda kind=kind: kind in [each["kind"] for each in quick("ps", "--json").json["nodes"]])

        quick("deploy", "story")
        assert quick("run", "story", "Hello", "-n", 4, "--json").json["usage"]["completion_tokens"] == 4
        assert quick("doctor", "--json").json["problems"] == 0

        refused = machine("join", made["token"], made["join_address"], "--kind", "client", code=1)
        assert "admits no client" in refused.error
        token = quick("token", "--kind", "client", "--json").json
        assert token["join_address"] == made["join_address"]
        machine("join", token["token"], made["join_address"], "--kind", "client", "--name", "second")
        assert replace(machine, inside=True)("status", "--json").json["pipelines"][0]["name"] == "story"
        used_up = person(tmp_path / "late")("join", token["token"], made["join_address"], "--kind", "client", code=1)
        assert "used up" in used_up.error

        assert quick("expel", "client/second", "--json").json == {"expelled": ["client/second"]}
        assert "client/second was expelled" in machine("status", code=1).error
        assert "it is you" in quick("expel", "client/operator", code=1).error
        assert quick("expel").out == "client/second\n"


def test_joining_what_is_not_there(operator: Cli) -> None:
    operator = replace(operator, inside=True)
    token = f"eldric.{'0' * 64}.{'1' * 16}.{'A' * 43}"
    assert "cannot be reached" in operator("join", token, "127.0.0.1:1", code=1).error
    assert "no address" in operator("join", token, "somewhere", code=1).error
    assert "no join token" in operator("join", "secret", "127.0.0.1:1", code=1).error
    assert "kind of node" in operator("join", token, "127.0.0.1:1", "--kind", "spy", code=1).error
    assert "no name for a node" in operator("join", token, "127.0.0.1:1", "--name", "a/b", code=1).error


def test_nodes_that_cannot_start(operator: Cli, tmp_path: Path) -> None:
    assert "join the cluster first" in operator("worker", "--folder", tmp_path, "--controller", "a:1", code=1).error
    made = operator("init", "--host", "127.0.0.1", "--json").json
    assert "controller" in operator("worker", "--folder", made["folder"], "--controller", "a:1", code=1).error
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = operator("controller", "--folder", made["folder"], "--http-port", port, "--quiet", code=1)
    assert f"127.0.0.1:{port} is in use" in done.error
    assert "--http-port" in done.error
