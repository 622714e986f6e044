"""A worker that nobody can connect to: it joins through an edge, serves a stage, and its stream survives a cut.

Needs root: the hosts are network namespaces (benchmarks/network.py).
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network import Network, network, why_not
from benchmarks.network_cluster import NetworkCluster, network_cluster
from eldric import node_file
from tests.models import storyteller

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

TOKENS = 400
CUT_S = 2.0

#: Prints the tokens of a generation, each as it comes, and why it ended.
GENERATE = """
import sys
from eldric.client import Client, Delta, Finished
with Client(folder=sys.argv[1]) as client:
    options = {"max_tokens": int(sys.argv[2]), "temperature": 0.0, "ignore_eos": True}
    for event in client.generate("tale", "Once upon a time", **options):
        if isinstance(event, Delta):
            print(*(token.id for token in event.tokens), flush=True)
        elif isinstance(event, Finished):
            print(event.reason, flush=True)
"""

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0)"


@dataclass
class Home:
    """A cluster with a host that is closed to others, and the worker on it."""

    net: Network
    cluster: NetworkCluster
    folder: Path
    edge: dict[str, Any]
    process: "subprocess.Popen[bytes] | None" = None

    def cli(self, *arguments: str) -> Any:
        return json.loads(self.cluster.eldric_cli("front", *arguments, "--json"))

    def join(self) -> None:
        """Through the edge's join port, with a token from the front."""
        token = self.cli("token")["token"]
        command = [sys.executable, "-m", "eldric.cli.main", "join", token, self.edge["join_address"], "--name", "home"]
        command += ["--edge", self.edge["grpc_address"], "--folder", str(self.folder), "--json"]
        said = json.loads(subprocess.run(self.net.command("home", command), stdout=subprocess.PIPE, check=True).stdout)
        assert said["command"].endswith(f"worker --folder {self.folder} --edge {self.edge['grpc_address']}")

    def start(self) -> None:
        command = [sys.executable, "-m", "eldric.cli.main", "worker", "--folder", str(self.folder), "--quiet"]
        command += ["--edge", self.edge["grpc_address"], "--host", self.net.addresses["home"], "--threads", "1"]
        command += ["--http-port", "0", "--memory", "1GB"]
        self.process = subprocess.Popen(self.net.command("home", command), stdin=subprocess.DEVNULL)

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(15)

    def deploy(self, *options: str) -> dict[str, dict[str, Any]]:
        """Stages by worker: one each."""
        options = ("--stages", "2", "--slots", "1", "--ctx", "512", *options)
        stages = self.cli("deploy", "tale", *options)["pipeline"]["stages"]
        assert {stage["worker"] for stage in stages} == {"home", "worker-1"}
        return {stage["worker"]: stage for stage in stages}

    def generate(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", GENERATE, str(self.cluster.folder), str(TOKENS)]
        return subprocess.Popen(self.net.command("front", command), stdout=subprocess.PIPE, text=True)

    @property
    def log(self) -> str:
        """Of the worker."""
        return "".join(path.read_text() for path in self.folder.glob("log*"))

    def workers(self) -> dict[str, str]:
        return {worker["name"]: worker["state"] for worker in self.cli("workers")["workers"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("network")
    (store := folder / "store").mkdir()
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network("front", "edge", "home", closed=["home"]))
        cluster = stack.enter_context(network_cluster(net, folder / "cluster"))
        cluster.start("front", "controller")
        cluster.launch("front", "data", "data", "--models", str(store))
        cluster.launch("front", "router")
        cluster.launch("front", "worker", "worker-1", "--threads", "1", "--memory", "1GB")
        cluster.launch("edge", "edge", "edge", "--ports", "20000-20019")
        cluster.wait()
        made = Home(net, cluster, folder / "home", node_file.read(cluster.folder / "edge") or {})
        made.join()
        made.start()
        stack.callback(made.end)
        cluster.wait_for_workers("front", ("home", "worker-1"))
        cluster.eldric_cli("front", "models", "add", str(storyteller()), "--name", "tale")
        yield made


def test_nobody_can_connect_to_the_worker_but_through_the_edge(home: Home) -> None:
    document = node_file.read(home.folder) or {}
    assert document["grpc_address"].rpartition(":")[0] == home.net.addresses["edge"]
    assert 20000 <= int(document["grpc_address"].rpartition(":")[2]) <= 20019
    assert home.process is not None
    shown = home.net.command("home", ["cat", "/proc/net/tcp"])
    lines = subprocess.run(shown, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[1:]
    listening = [int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == "0A"]
    assert listening
    command = [sys.executable, "-c", CONNECT, home.net.addresses["home"], str(listening[0])]
    tried = subprocess.run(home.net.command("front", command), stderr=subprocess.DEVNULL, check=False)
    assert tried.returncode != 0


def stream(home: Home, *, cut_s: float = 0.0) -> list[str]:
    """Everything that a generation says; the worker's host is cut off for a while in the middle of it."""
    with home.generate() as process:
        assert process.stdout is not None
        words: list[str] = []
        while cut_s and len(words) < 40:
            words += process.stdout.readline().split()
        if cut_s:
            home.net.cut("home")
            time.sleep(cut_s)
            home.net.mend("home")
        return words + process.stdout.read().split()


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--transport", "relay"), ()], ids=["relayed", "direct"])
def test_a_worker_that_is_cut_off_for_two_seconds_costs_no_stream(way: tuple[str, ...], home: Home) -> None:
    """Behind NAT it can connect to others, which cannot connect to it: only the link to it must be relayed."""
    stages = home.deploy(*way)
    try:
        assert stages["worker-1"]["link"]["transport"] == "relay" and not stages["worker-1"]["link"]["fallback"]
        assert stages["home"]["link"]["transport"] == ("relay" if way else "zmq")
        undisturbed = stream(home)
        assert len(undisturbed) == TOKENS + 1 and undisturbed[-1] == "length"
        lost = home.log.count("event=tunnel_lost")
        began = time.monotonic()
        assert stream(home, cut_s=CUT_S) == undisturbed
        assert time.monotonic() - began > CUT_S
        assert home.log.count("event=tunnel_lost") > lost
        assert home.workers() == {"home": "up", "worker-1": "up"}
        (pipeline,) = home.cli("status", "tale")["pipelines"]
        assert (pipeline["state"], pipeline["epoch"]) == ("ready", 1)
    finally:
        home.cli("undeploy", "tale")
