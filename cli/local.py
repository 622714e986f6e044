"""A cluster of processes on this machine: made, started, looked at and ended, all below one folder.

FOLDER/cluster.json    addresses of the controllers, and the roster
FOLDER/lock            held (folder_lock.py) by the command that starts or ends nodes
FOLDER/operator/       the operator's certificate
FOLDER/models/         the model store
FOLDER/KIND[-N]/       one node each: certificate, state, node.json, log
"""

import datetime
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from eldric.cli import certificates, interrupts, processes
from eldric.cli.processes import NodeProcess
from eldric.cli.roster import NodeEntry, Shape, roster
from eldric.client import Client
from eldric.client.cluster import CLUSTER_FILE, OPERATOR
from eldric.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from eldric.names import split_address
from eldric.security import Authority

#: Longest wait for one node to answer after its start, and for all to be registered after that.
_START_S = 60.0
#: Longest wait for nodes to end by themselves; then they are killed.
_STOP_S = 15.0

_ROUTER_PORT = "--router-port"

Say = Callable[[str], None]


@dataclass(slots=True)
class LocalCluster:
    folder: Path  # absolute
    name: str
    nodes: list[NodeEntry] = field(default_factory=list)
    controllers: list[str] = field(default_factory=list)  # none before the first start

    @classmethod
    def create(cls, folder: Path, shape: Shape, name: str = "local") -> Self:
        """Make the folder, the authority and everybody's certificate. Raises AlreadyExists, InvalidRequest."""
        if (folder / CLUSTER_FILE).exists():
            raise AlreadyExists(f"{folder} holds a cluster already")
        return cls._create(folder, shape, name)

    @classmethod
    def _create(cls, folder: Path, shape: Shape, name: str) -> Self:
        cluster = cls(folder, name, roster(folder, shape))
        authority = Authority.create(name)
        authority.save(folder / "controller" / "authority")
        for entry in cluster.nodes:
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
            raise NotFound(
                f"{folder} holds no cluster: start one with `eldric-cli up --dir {shlex.quote(str(folder))}`"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{path} is not the file of a local cluster: {error!r}") from error

    @classmethod
    def open(cls, folder: Path, shape: Shape, given: Set[str]) -> Self:
        """The cluster in a folder, made where there is none. `given` names the fields of `shape` that were asked for.

        A cluster that never came up is made anew. Raises AlreadyExists when the one that is there has another number
        of workers, or runs with other settings.
        """
        if not (folder / CLUSTER_FILE).exists():
            return cls.create(folder, shape)
        cluster = cls.load(folder)
        if not cluster.controllers:
            return cls._create(folder, shape, cluster.name)
        count = sum(entry.kind == "worker" for entry in cluster.nodes)
        if "workers" in given and shape.workers != count:
            raise AlreadyExists(
                f"{folder} holds a cluster of {count} workers: `eldric-cli down --dir {shlex.quote(str(folder))}` and "
                "remove the folder, its models included, or use another --dir"
            )
        affected = {"router"} if given & {"router_port", "allow_origins"} else set()
        affected |= {"worker"} if given & {"device", "memory", "threads", "pin"} else set()
        cluster._settle(roster(folder, replace(shape, workers=count)), affected)
        return cluster

    def _settle(self, wanted: list[NodeEntry], kinds: Set[str]) -> None:
        """Take over the settings of nodes of these kinds."""
        for index, (entry, other) in enumerate(zip(self.nodes, wanted, strict=True)):
            if entry == other or entry.kind not in kinds:
                continue
            if self.process(entry).running:
                down = f"eldric-cli down --dir {shlex.quote(str(self.folder))}"
                raise AlreadyExists(f"{entry.name} runs with other settings: `{down}` first")
            self.nodes[index] = other
        self.save()

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

    def node_folder(self, entry: NodeEntry) -> Path:
        return self.folder / entry.folder

    def processes(self) -> list[NodeProcess]:
        return [self.process(entry) for entry in self.nodes]

    def process(self, entry: NodeEntry) -> NodeProcess:
        return processes.look(entry, self.node_folder(entry))

    def up(self, say: Say) -> list[NodeProcess]:
        """Start every node that does not run, the controller first, and wait until all are registered.

        Whatever goes wrong, an interrupt included, what was started is ended. Raises AddressInUse, NodeFailed,
        DeadlineExceeded.
        """
        before = {process.folder for process in self.processes() if process.running}
        try:
            self._check_ports()
            self._renew_certificates()
            for group in self._groups():
                self._start(group, say)
                if group[0].kind == "controller":
                    self._keep_address(group[0])
            self._wait_until_registered()
        except BaseException:
            with interrupts.deferred():
                started = processes.find(self.node_folder(entry) for entry in self.nodes)
                processes.end({folder: pid for folder, pid in started.items() if folder not in before})
            raise
        return self.processes()

    def down(self, say: Say) -> tuple[int, list[NodeEntry]]:
        """End every node, the controller last. Returns how many ran, and those that had to be killed."""
        running = processes.find(self.node_folder(entry) for entry in self.nodes)
        killed = []
        for group in reversed(list(self._groups())):
            folders = {self.node_folder(entry): entry for entry in group}
            ending = {folder: running[folder] for folder in folders if folder in running}
            for folder in ending:
                say(f"stopping {folders[folder].name}")
            killed += [folders[folder] for folder in processes.end(ending, _STOP_S)]
            for folder in folders:
                (folder / "node.json").unlink(missing_ok=True)
        return len(running), killed

    def _groups(self) -> Iterator[list[NodeEntry]]:
        """Nodes that may start side by side."""
        yield [entry for entry in self.nodes if entry.kind == "controller"]
        yield [entry for entry in self.nodes if entry.kind != "controller"]

    def _start(self, entries: list[NodeEntry], say: Say) -> None:
        missing = [entry for entry in entries if not self.process(entry).running]
        under_way = processes.find(map(self.node_folder, missing)) if missing else {}
        started: dict[str, subprocess.Popen[bytes]] = {}
        for entry in missing:
            if self.node_folder(entry) in under_way:
                continue
            say(f"starting {entry.name}")
            known = self.controllers if entry.kind != "controller" else []
            with interrupts.deferred():
                started[entry.name] = processes.spawn(entry, self.node_folder(entry), known)
        deadline = time.monotonic() + _START_S
        for entry in missing:
            self._wait_for(entry, started.get(entry.name), deadline)

    def _wait_for(self, entry: NodeEntry, started: "subprocess.Popen[bytes] | None", deadline: float) -> None:
        while not self.process(entry).running:
            if started is not None and (code := started.poll()) is not None:
                raise processes.failure(entry, self.node_folder(entry), code)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{entry.kind} {entry.name} did not start within {_START_S:.0f} s; see its log in "
                    f"{self.node_folder(entry)}"
                )
            time.sleep(processes.POLL_S)

    def _check_ports(self) -> None:
        """Before anything is started: the ports that are fixed are free.

        A controller's ports are those of its first start, where the others look for it; it gets other ones when they
        are taken and nobody is left who could look for it.
        """
        from eldric.web import check_free  # with it comes a web server, which only this method needs

        for index, entry in enumerate(self.nodes):
            if self.process(entry).running:
                continue
            if entry.kind == "router":
                port = int(entry.option("--http-port") or 0)
                for number in (port, port + 1000) if port else ():
                    check_free("127.0.0.1", number, _ROUTER_PORT)
            if entry.kind == "controller" and not any(each.running for each in self.processes()):
                try:
                    for option in ("--http-port", "--grpc-port", "--join-port"):
                        check_free("127.0.0.1", int(entry.option(option) or 0), option)
                except AlreadyExists:
                    self.nodes[index] = entry.with_options({"--http-port": "0", "--grpc-port": "0", "--join-port": "0"})

    def _renew_certificates(self) -> None:
        """Of the operator and of nodes that do not run: nobody else does, and they may have been down for long."""
        authority = Authority.load(self.folder / "controller" / "authority")
        now = datetime.datetime.now(datetime.UTC)
        for folder in (self.folder / OPERATOR, *(each.folder for each in self.processes() if not each.running)):
            certificates.reissue(authority, folder, now)

    def _keep_address(self, entry: NodeEntry) -> None:
        """A controller that starts again must be found where the others look for it: write its ports down."""
        process = self.process(entry)
        if not process.running:
            raise Unavailable(f"the controller has ended; see its log in {process.folder}")
        if [process.grpc_address] == self.controllers:
            return
        self.controllers = [process.grpc_address]
        addresses = {
            "--http-port": process.http_url.rpartition("/")[2],
            "--grpc-port": process.grpc_address,
            "--join-port": process.join_address,
        }
        ports = {option: str(split_address(address)[1]) for option, address in addresses.items() if address}
        self.nodes = [entry.with_options(ports) if each == entry else each for each in self.nodes]
        self.save()

    def _wait_until_registered(self) -> None:
        """Every node's process runs; wait until the controller counts them all as up."""
        deadline = time.monotonic() + _START_S
        expected = {(entry.kind, entry.name): entry for entry in self.nodes}
        with Client(folder=self.folder) as client:
            while missing := expected.keys() - {
                (node.kind, node.name) for node in client.nodes() if node.state == "up"
            }:
                for each in missing:
                    if not self.process(expected[each]).running:
                        raise processes.failure(expected[each], self.node_folder(expected[each]))
                if time.monotonic() > deadline:
                    names = ", ".join(sorted(name for _, name in missing))
                    raise DeadlineExceeded(f"not registered within {_START_S:.0f} s: {names}; see `eldric-cli logs`")
                time.sleep(processes.POLL_S)
