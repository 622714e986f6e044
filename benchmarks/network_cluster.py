"""A cluster whose nodes are on the hosts of a network (network.py): real processes that reach each other by it only.

    with network("front", "worker-1", "worker-2") as net, network_cluster(net, folder) as cluster:
        cluster.start("front", "controller")
        cluster.start("worker-1", "worker", "worker-1", "--models", "http")
        cluster.eldric_cli("front", "status")

They share one disk: what a node may read of it is a matter of its options.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.network import Network
from eldric import node_file
from eldric.client.cluster import CLUSTER_FILE, OPERATOR
from eldric.security import Authority

_MODULE = (sys.executable, "-m", "eldric.cli.main")
_START_S, _STOP_S, _POLL_S = 60.0, 15.0, 0.02


class NodeFailed(Exception):
    """A node did not start. Carries its last words."""


@dataclass(slots=True)
class NetworkCluster:
    """Nodes by name. folder: each node's own folder is below it, and so is what clients need (`--dir`)."""

    net: Network
    folder: Path
    _authority: Authority
    _controllers: list[str] = field(default_factory=list)
    _nodes: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def start(self, host: str, kind: str, name: str = "", *options: str) -> None:
        """Start a node on a host, and wait until it serves. The first must be the controller. Raises NodeFailed."""
        self.launch(host, kind, name, *options)
        self.wait()

    def launch(self, host: str, kind: str, name: str = "", *options: str) -> None:
        """Start a node, for `wait` to wait for."""
        name = name or kind
        folder = self.folder / name
        if not folder.exists():
            self._authority.issue_identity(kind, name).save(folder)
        arguments = ["--folder", str(folder), "--quiet", "--http-port", "0", "--host", self.net.addresses[host]]
        for address in self._controllers:
            arguments += ["--controller", address]
        command = self.command(host, kind, *arguments, *options)
        with (folder / "output").open("wb") as output:
            self._nodes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def wait(self) -> None:
        """Until every node serves. Raises NodeFailed."""
        for name, process in self._nodes.items():
            document = self._document(name, process)
            if document["kind"] == "controller" and not self._controllers:
                self._controllers.append(document["grpc_address"])
                (self.folder / CLUSTER_FILE).write_text(json.dumps({"controllers": self._controllers}))

    def stop(self, name: str) -> None:
        """End a node as an operator would."""
        process = self._nodes.pop(name)
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pid(self, name: str) -> int:
        return self._nodes[name].pid

    def eldric_cli(self, host: str, *arguments: str) -> str:
        """What `eldric-cli` prints on a host. Raises CalledProcessError; its complaint is on stderr."""
        command = self.command(host, *arguments, "--dir", str(self.folder))
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout

    def wait_for_workers(self, host: str, names: Collection[str]) -> None:
        """Until all of these are registered and up. host: where that is asked. Raises NodeFailed."""
        deadline = time.monotonic() + _START_S
        while True:
            nodes = json.loads(self.eldric_cli(host, "workers", "--json"))["workers"]
            if missing := set(names) - {node["name"] for node in nodes if node["state"] == "up"}:
                if time.monotonic() > deadline:
                    raise NodeFailed(f"not up after {_START_S:.0f} s: {', '.join(sorted(missing))}")
            else:
                return

    def command(self, host: str, *arguments: str) -> list[str]:
        """The command that runs `eldric-cli` on a host."""
        return self.net.command(host, [*_MODULE, *arguments])

    def close(self) -> None:
        """End every node, the first ones last."""
        for name in reversed(list(self._nodes)):
            self.stop(name)

    def _document(self, name: str, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        """What a node says of itself once it serves."""
        deadline = time.monotonic() + _START_S
        while (document := node_file.read(self.folder / name)) is None or document.get("pid") != process.pid:
            if process.poll() is not None or time.monotonic() > deadline:
                words = (self.folder / name / "output").read_text(errors="replace").strip().splitlines()[-1:]
                raise NodeFailed(f"{name} does not start: {' '.join(words) or process.poll()}")
            time.sleep(_POLL_S)
        return document


@contextlib.contextmanager
def network_cluster(net: Network, folder: Path) -> Iterator[NetworkCluster]:
    """An empty cluster in a folder, with an operator's certificate. Its nodes end with the block."""
    authority = Authority.create("network")
    authority.save(folder / "controller" / "authority")
    authority.issue_identity("controller", "controller").save(folder / "controller")
    authority.issue_identity("client", "operator").save(folder / OPERATOR)
    cluster = NetworkCluster(net, folder, authority)
    try:
        yield cluster
    finally:
        cluster.close()


@contextlib.contextmanager
def exported(cluster: NetworkCluster, host: str, store: Path) -> Iterator[None]:
    """A model store is exported over NFS from a host, and its data worker tells everybody. Raises NodeFailed."""
    command = cluster.command(
        host, "data", "export", "--store", str(store), "--host", cluster.net.addresses[host], "--json"
    )
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with process.stdout:
            if not process.stdout.readline():
                raise NodeFailed("the export does not start; its complaint is above")
            yield
    finally:
        process.terminate()
        process.wait(_STOP_S)
