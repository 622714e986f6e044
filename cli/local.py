"""A cluster of processes on this machine: made, started, looked at and ended, all below one folder.

FOLDER/cluster.json    addresses of the controllers, and the roster
FOLDER/operator/       the operator's certificate
FOLDER/models/         the model store
FOLDER/KIND[-N]/       one node each: certificate, state, node.json, log
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from eldric.client.cluster import CLUSTER_FILE, OPERATOR
from eldric.errors import AlreadyExists, DeadlineExceeded, EldricError, InvalidRequest, NotFound
from eldric.security import Authority

#: Longest wait for one node to answer after its start.
_START_S = 30.0
#: Longest wait for a node to end by itself; then it is killed.
_STOP_S = 15.0
_POLL_S = 0.02

Say = Callable[[str], None]


class NodeFailed(EldricError):
    """A node's process ended while it started. Carries the last lines of its log."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node of the roster. `arguments` are those of `eldric-cli KIND`, beyond folder, name and controllers."""

    kind: str
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name if self.kind == "worker" else self.kind


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """A node as its node.json describes it."""

    entry: NodeEntry
    folder: Path
    pid: int = 0
    grpc_address: str = ""
    http_url: str = ""
    running: bool = False

    @property
    def log(self) -> Path:
        return self.folder / "log"


@dataclass(slots=True)
class LocalCluster:
    folder: Path
    name: str
    nodes: list[NodeEntry] = field(default_factory=list)
    controllers: list[str] = field(default_factory=list)

    @classmethod
    def create(cls, folder: Path, nodes: list[NodeEntry], name: str = "local") -> Self:
        """Make the folder, the authority and everybody's certificate. Raises AlreadyExists."""
        if (folder / CLUSTER_FILE).exists():
            raise AlreadyExists(f"{folder} holds a cluster already")
        cluster = cls(folder, name, nodes)
        authority = Authority.create(name)
        authority.save(folder / "controller" / "authority")
        for entry in nodes:
            authority.issue_identity(entry.kind, entry.name).save(folder / entry.folder)
        authority.issue_identity("client", "operator").save(folder / OPERATOR)
        (folder / "models").mkdir(exist_ok=True)
        cluster.save()
        return cluster

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises NotFound, InvalidRequest."""
        path = folder / CLUSTER_FILE
        try:
            document: dict[str, Any] = json.loads(path.read_text())
            nodes = [NodeEntry(node["kind"], node["name"], tuple(node["arguments"])) for node in document["nodes"]]
            return cls(folder, document["name"], nodes, document["controllers"])
        except FileNotFoundError:
            raise NotFound(f"{folder} holds no cluster: start one with `eldric-cli up --dir {folder}`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{path} is not the file of a local cluster: {error!r}") from error

    def save(self) -> None:
        document = {
            "name": self.name,
            "controllers": self.controllers,
            "nodes": [asdict(entry) for entry in self.nodes],
        }
        path = self.folder / CLUSTER_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=2) + "\n")
        partial.replace(path)

    def processes(self) -> list[NodeProcess]:
        return [self.process(entry) for entry in self.nodes]

    def process(self, entry: NodeEntry) -> NodeProcess:
        folder = self.folder / entry.folder
        try:
            document = json.loads((folder / "node.json").read_text())
            pid = int(document["pid"])
            return NodeProcess(
                entry, folder, pid, document["grpc_address"], document["http_url"], _is_node(pid, folder)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return NodeProcess(entry, folder)

    def start(self, say: Say) -> list[NodeProcess]:
        """Start every node that does not run, the controller first. What was started is ended when one fails."""
        started: list[subprocess.Popen[bytes]] = []
        try:
            for group in self._groups():
                waiting = []
                for entry in group:
                    if not self.process(entry).running:
                        say(f"starting {entry.kind} {entry.name}")
                        process = self._spawn(entry)
                        started.append(process)
                        waiting.append((entry, process))
                for entry, process in waiting:
                    self._wait_for(entry, process)
                if group[0].kind == "controller":
                    self._keep_address(group[0])
        except BaseException:
            for process in started:
                process.kill()
                process.wait()
            raise
        return self.processes()

    def stop(self, say: Say) -> list[NodeProcess]:
        """End every node, the controller last. Returns those that had to be killed."""
        killed = []
        for group in reversed(list(self._groups())):
            running = [process for process in map(self.process, group) if process.running]
            for process in running:
                say(f"stopping {process.entry.kind} {process.entry.name}")
                _signal(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_S
            for process in running:
                if not _gone(process, deadline):
                    _signal(process.pid, signal.SIGKILL)
                    _gone(process, time.monotonic() + _STOP_S)
                    killed.append(process)
                (process.folder / "node.json").unlink(missing_ok=True)
        return killed

    def _groups(self) -> Iterator[list[NodeEntry]]:
        """Nodes that may start side by side."""
        yield [entry for entry in self.nodes if entry.kind == "controller"]
        yield [entry for entry in self.nodes if entry.kind != "controller"]

    def _spawn(self, entry: NodeEntry) -> "subprocess.Popen[bytes]":
        folder = self.folder / entry.folder
        (folder / "node.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "eldric.cli.main", entry.kind, "--folder", str(folder), *entry.arguments]
        for address in self.controllers if entry.kind != "controller" else ():
            command += ["--controller", address]
        with open(folder / "output", "wb") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _wait_for(self, entry: NodeEntry, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + _START_S
        while not self.process(entry).running:
            if process.poll() is not None:
                raise NodeFailed(f"{entry.kind} {entry.name} ended while it started: {self._last_words(entry)}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{entry.kind} {entry.name} did not start within {_START_S:.0f} s")
            time.sleep(_POLL_S)

    def _last_words(self, entry: NodeEntry) -> str:
        try:
            lines = (self.folder / entry.folder / "output").read_text(errors="replace").strip().splitlines()
        except OSError:
            return "it left no output"
        return lines[-1].strip() if lines else "it said nothing"

    def _keep_address(self, entry: NodeEntry) -> None:
        """A controller that starts again must be found where the others look for it: write its ports down."""
        process = self.process(entry)
        if process.grpc_address in self.controllers:
            return
        document = json.loads((process.folder / "node.json").read_text())
        self.controllers = [process.grpc_address]
        ports = {
            "--http-port": document["http_url"].rpartition(":")[2],
            "--grpc-port": process.grpc_address.rpartition(":")[2],
        }
        if document.get("join_address"):
            ports["--join-port"] = document["join_address"].rpartition(":")[2]
        kept = NodeEntry(entry.kind, entry.name, _with_options(entry.arguments, ports))
        self.nodes = [kept if each is entry else each for each in self.nodes]
        self.save()


def _with_options(arguments: tuple[str, ...], options: dict[str, str]) -> tuple[str, ...]:
    kept: list[str] = []
    pairs = iter(arguments)
    for argument in pairs:
        if argument in options:
            next(pairs, None)
        else:
            kept.append(argument)
    return (*kept, *(part for option in options.items() for part in option))


def _is_node(pid: int, folder: Path) -> bool:
    """Whether the process is that node's and not another that got its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.cmdline()
    except psutil.Error:
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _gone(process: NodeProcess, deadline: float) -> bool:
    while _is_node(process.pid, process.folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
