"""The processes of a local cluster's nodes: started, found, and ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from eldric import node_file
from eldric.cli.roster import NodeEntry
from eldric.errors import EldricError
from eldric.names import KINDS

POLL_S = 0.02
#: Longest wait for a process that was killed to be gone, in seconds.
_KILL_S = 10.0
_MODULE = "eldric.cli.main"
#: What a node says before it has a log, and when it crashes.
OUTPUT = "output"


class NodeFailed(EldricError):
    """A node's process ended while it started. Carries its last words."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """A node as its node.json describes it. pid 0: it does not run, or has not come so far."""

    entry: NodeEntry
    folder: Path
    pid: int = 0
    grpc_address: str = ""
    http_url: str = ""
    join_address: str = ""

    @property
    def running(self) -> bool:
        return self.pid != 0

    @property
    def log(self) -> Path:
        return self.folder / "log"


def look(entry: NodeEntry, folder: Path) -> NodeProcess:
    """The node whose folder this is; a node.json that a killed process left behind does not count."""
    document = node_file.read(folder) or {}
    pid = document.get("pid")
    if not isinstance(pid, int) or not is_node(pid, folder):
        return NodeProcess(entry, folder)
    addresses = (str(document.get(key, "")) for key in ("grpc_address", "http_url", "join_address"))
    return NodeProcess(entry, folder, pid, *addresses)


def is_node(pid: int, folder: Path) -> bool:
    """Whether the process is that node's, and not another that got its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and _is_node_line(process.cmdline(), folder)
    except psutil.Error:
        return False


def find(folders: Iterable[Path]) -> dict[Path, int]:
    """Pids of nodes that run in these folders, also of those that have not written node.json (yet)."""
    wanted, found = list(folders), {}
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and _is_ours(line):
            found.update({folder: process.pid for folder in wanted if _is_node_line(line, folder)})
    return found


def _is_node_line(line: list[str], folder: Path) -> bool:
    return _is_ours(line) and str(folder) in line


def _is_ours(line: list[str]) -> bool:
    """Whether a command line is a node's: "python -m eldric.cli.main KIND ..." or "[python] eldric-cli KIND ..."."""
    program = _MODULE in line[:4] or any(Path(part).name == "eldric-cli" for part in line[:2])
    return program and any(kind in line[1:5] for kind in KINDS)


def spawn(entry: NodeEntry, folder: Path, controllers: Iterable[str]) -> "subprocess.Popen[bytes]":
    """Start a node in the background, in a session of its own: Ctrl-C on this terminal is not meant for it."""
    (folder / node_file.NAME).unlink(missing_ok=True)
    command = [sys.executable, "-m", _MODULE, entry.kind, "--folder", str(folder), "--quiet", *entry.arguments]
    for address in controllers:
        command += ["--controller", address]
    with open(folder / OUTPUT, "wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def failure(entry: NodeEntry, folder: Path, code: int | None = None) -> NodeFailed:
    """Why a node ended while it started, in its own last words. code: its exit code, or minus the signal."""
    try:
        lines = (folder / OUTPUT).read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    words = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = "ended" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return NodeFailed(f"{entry.kind} {entry.name} {how} while it started: {words.removeprefix('error: ')}")


def end(nodes: dict[Path, int], seconds: float = 0.0) -> list[Path]:
    """Ask nodes to end, wait that long for all of them, then kill. Returns the folders of those that were killed."""
    for pid in nodes.values() if seconds else ():
        _signal(pid, signal.SIGTERM)
    left = _wait_gone(nodes, seconds)
    for pid in left.values():
        _signal(pid, signal.SIGKILL)
    _wait_gone(left, _KILL_S)
    for folder in nodes:
        (folder / node_file.NAME).unlink(missing_ok=True)
    return list(left)


def _wait_gone(nodes: dict[Path, int], seconds: float) -> dict[Path, int]:
    """Those that still run after that time."""
    deadline = time.monotonic() + seconds
    while left := {folder: pid for folder, pid in nodes.items() if is_node(pid, folder)}:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return left


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def node_pids() -> list[int]:
    """All processes of nodes on this machine, of any cluster."""
    return [process.pid for process in psutil.process_iter(["cmdline"]) if _is_ours(process.info["cmdline"] or [])]
