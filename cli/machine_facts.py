"""What `doctor` looks at on a machine."""

import importlib.metadata
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from eldric.config import HTTP_PORTS

#: Longest wait for the compute library to be loaded, in seconds.
_ENGINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Engine:
    """The compute library that a worker would use here."""

    version: str
    cpu_variant: str
    devices: tuple[str, ...]
    memory_bytes: int  # that a worker would offer


@dataclass(frozen=True, slots=True)
class Disk:
    path: Path
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Listener:
    """Who listens on a port that a node would use; pid and program are unknown for processes of others."""

    port: int
    use: str
    pid: int = 0
    program: str = ""


def packages() -> dict[str, tuple[str | None, str]]:
    """Installed version, None if missing, and the oldest that is wanted, of what this distribution requires."""
    found: dict[str, tuple[str | None, str]] = {}
    try:
        required = importlib.metadata.requires("eldric") or []
    except importlib.metadata.PackageNotFoundError:
        return found  # run from a checkout
    for requirement in required:
        if "extra ==" in requirement:
            continue
        if parts := re.match(r"([\w.-]+)\s*(?:[><=~!]=?\s*([\w.]+))?", requirement):
            name, wanted = parts[1], parts[2] or "0"
            try:
                found[name] = importlib.metadata.version(name), wanted
            except importlib.metadata.PackageNotFoundError:
                found[name] = None, wanted
    return found


def engine() -> Engine | str:
    """What a worker would compute with, or why it could not. Looked at in another process: a library that does not
    fit this machine may end it."""
    command = [sys.executable, "-m", "eldric.cli.engine_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ENGINE_S)
    except subprocess.TimeoutExpired:
        return f"ggml was not loaded within {_ENGINE_S:.0f} s"
    if done.returncode < 0:
        return f"loading ggml killed the process (signal {-done.returncode})"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["ggml could not be loaded"])[-1]
    if "problem" in answer:
        return str(answer["problem"])
    return Engine(answer["version"], answer["cpu_variant"], tuple(answer["devices"]), answer["memory_bytes"])


def disk(path: Path) -> Disk:
    """Of the file system that the path is, or would be, on."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return Disk(path, usage.free, usage.total)


def limit(kind: int) -> int | None:
    """A soft limit of this process; None where there is none."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def default_ports() -> dict[int, str]:
    """Ports that nodes use unless they are told others, and for what."""
    ports: dict[int, str] = {}
    for kind, http in HTTP_PORTS.items():
        if kind != "edge":
            ports |= {http: f"{kind}, HTTP", http + 1000: f"{kind}, gRPC"}
    ports[HTTP_PORTS["controller"] + 2000] = "controller, joining"
    return ports


def listeners() -> list[Listener]:
    """Who has them."""
    taken = [port for port in default_ports() if _is_taken(port)]
    pids = dict(_owners(set(taken))) if taken else {}
    return [Listener(port, default_ports()[port], *pids.get(port, (0, ""))) for port in taken]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _owners(ports: set[int]) -> Iterator[tuple[int, tuple[int, str]]]:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return
    for connection in connections:
        port = connection.laddr.port if connection.laddr else 0
        if connection.status == psutil.CONN_LISTEN and port in ports and connection.pid:
            try:
                yield port, (connection.pid, psutil.Process(connection.pid).name())
            except psutil.Error:
                yield port, (connection.pid, "")
