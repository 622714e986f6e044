"""Real NFS for tests: nfs-ganesha exports a folder, and this program's FUSE client mounts it."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from eldric.data.export import ExportConfig
from eldric.data.ganesha import PROGRAM, Ganesha, serving
from eldric.nfs.address import NfsAddress
from eldric.nfs.mounting import OwnMounts, fuse_problem
from eldric.v1 import stage_pb2


def need_nfs() -> None:
    """Skips the test where an NFS server and a FUSE client cannot run."""
    missing = [program for program in (PROGRAM, "ss") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here: `make programs` installs what is missing")
    if os.geteuid() != 0:
        pytest.skip("nfs-ganesha needs root")
    if problem := fuse_problem():
        pytest.skip(problem)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Server:
    """An NFS server that can be stopped, killed and started again on its port."""

    config: ExportConfig
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _ganesha: Ganesha | None = None

    @property
    def address(self) -> NfsAddress:
        return self.config.address

    @property
    def export(self) -> stage_pb2.NfsExport:
        return stage_pb2.NfsExport(host=self.address.host, port=self.address.port, path=self.address.path)

    def start(self) -> None:
        self._ganesha = self._running.enter_context(serving(self.config))

    def signal(self, number: int) -> None:
        assert self._ganesha is not None
        self._ganesha.process.send_signal(number)

    def kill(self) -> None:
        assert self._ganesha is not None
        self._ganesha.process.kill()
        self._ganesha.process.wait()
        self._running.close()

    def close(self) -> None:
        if self._ganesha is not None and self._ganesha.process.poll() is None:
            self.signal(signal.SIGCONT)
        self._running.close()

    def sent_bytes(self) -> int:
        """Bytes that the server sent over the connections that are open, by the kernel's count."""
        command = ["ss", "-tinH", "state", "established", f"sport = :{self.address.port}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(map(int, re.findall(r"bytes_sent:(\d+)", told)))


@contextlib.contextmanager
def exporting(folder: Path) -> Iterator[Server]:
    server = Server(ExportConfig(folder, NfsAddress("127.0.0.1", "/models", free_port())))
    server.start()
    try:
        yield server
    finally:
        server.close()


@dataclass(slots=True)
class Mounted:
    """A mount through the FUSE client."""

    folder: Path
    client: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def mounted(server: Server, folder: Path) -> Iterator[Mounted]:
    """folder: of mounts, as a worker has one."""
    mounts = OwnMounts(folder)
    try:
        place = mounts.mount(server.address)
        client = mounts._clients[server.address]
        yield Mounted(place, client)
        client.send_signal(signal.SIGCONT)
    finally:
        mounts.close()
