"""Hosts on one machine, for tests and benchmarks: network namespaces on a switch with links of a set rate and delay.

    with network("front", "worker-1", "worker-2", rate_bits=1e9, delay_ms=1.0) as net:
        subprocess.run(net.command("worker-1", [program, "--host", net.addresses["worker-1"]]))

Needs Linux and root. Hosts reach each other and nothing else, and this process is not among them unless it enters one.
Everything is gone after the block, also when this process is killed within it: namespaces, devices, the processes in
them, memory groups. See network_switch.py, the process that sees to that.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.memory_groups import make_group
from benchmarks.network_switch import DEVICE

_CLONE_NEWNET = 0x40000000


class NetworkUnavailable(Exception):
    """This machine or user cannot make such networks. Says why, and what to do."""


def why_not() -> str | None:
    """Why this process cannot make a network; None when it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces and memory groups need root: run it as root, or with sudo"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun: load the kernel's tun module, or give the container that device"
    return None


@dataclass(slots=True)
class Network:
    """Hosts that can reach each other. addresses: IPv4, by name."""

    addresses: dict[str, str]
    _switch: "subprocess.Popen[bytes]"
    _namespaces: dict[str, int]
    _groups: dict[str, list[Path]] = field(default_factory=dict)
    _hidden: dict[str, list[Path]] = field(default_factory=dict)

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host, in the host's latest memory group if it has one.

        The process that it starts becomes the command: its pid and exit code are the command's own.
        """
        made = ["nsenter", f"--net={self._path(host)}", "--"]
        if host in self._groups:
            made = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._groups[host][-1] / "cgroup.procs"), *made]
        for folder in self._hidden.get(host, ()):
            made += ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)]
        return [*made, *command]

    def hide(self, host: str, folder: Path) -> None:
        """What is started on a host from now on sees an empty folder there, and what it mounts is seen by it alone."""
        self._hidden.setdefault(host, []).append(folder)

    def limit_memory(self, host: str, nbytes: int) -> None:
        """All that is started on a host from now on shares so much memory, page cache included.

        What runs there already keeps the limit that it has. Raises NetworkUnavailable.
        """
        try:
            group = make_group(f"eldric-{self._switch.pid}-{host}-{len(self.memory_groups(host))}", nbytes)
        except OSError as error:
            raise NetworkUnavailable(f"no memory group can be made: {error}") from error
        self._tell(group=str(group))
        self._groups.setdefault(host, []).append(group)

    def memory_groups(self, host: str) -> list[Path]:
        """Their folders below /sys/fs/cgroup, one for each `limit_memory`."""
        return self._groups.get(host, [])

    def sent_bytes(self, host: str) -> int:
        """What a host's device has sent so far. TCP's large segments count as one frame each, with one header."""
        return self._counter(host, "transmit")

    def received_bytes(self, host: str) -> int:
        return self._counter(host, "receive")

    def cut(self, host: str) -> None:
        """Lose every frame to and from a host, until `mend`."""
        self._tell(cut=host)

    def mend(self, host: str) -> None:
        self._tell(mend=host)

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and threads and processes that it starts meanwhile, are on a host."""
        with open("/proc/thread-self/ns/net") as home, open(self._path(host)) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def _path(self, host: str) -> str:
        return f"/proc/{self._switch.pid}/fd/{self._namespaces[host]}"

    def _counter(self, host: str, direction: str) -> int:
        shown = subprocess.run(
            ["nsenter", f"--net={self._path(host)}", "--", "cat", "/proc/net/dev"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(f"{DEVICE}:"))
        fields = line.partition(":")[2].split()
        return int(fields[8 if direction == "transmit" else 0])

    def _tell(self, **command: str) -> None:
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps(command).encode() + b"\n")
        self._switch.stdin.flush()


@contextlib.contextmanager
def network(
    *hosts: str, rate_bits: float = 1e9, delay_ms: float = 1.0, closed: Collection[str] = ()
) -> Iterator[Network]:
    """Make hosts. rate_bits: of each host's link, each way, per second; delay_ms: added one way between any two.

    closed: hosts to which nobody can open a connection, as behind a NAT; they can open connections to others.
    Raises NetworkUnavailable.
    """
    if (reason := why_not()) is not None:
        raise NetworkUnavailable(reason)
    addresses = {host: f"10.99.0.{number}" for number, host in enumerate(hosts, 1)}
    specification = {
        "hosts": [{"name": host, "address": addresses[host], "closed": host in closed} for host in hosts],
        "rate": rate_bits / 8,
        "delay": delay_ms / 1e3,
    }
    command = [sys.executable, "-m", "benchmarks.network_switch", json.dumps(specification)]
    # In a session of its own: Ctrl-C is not meant for it, it ends when its input does.
    switch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert switch.stdout is not None
        line = switch.stdout.readline()
        if not line:
            raise NetworkUnavailable("the switch did not start; its complaint is above")
        yield Network(addresses, switch, json.loads(line))
    finally:
        for pipe in (switch.stdin, switch.stdout):
            if pipe is not None:
                pipe.close()
        try:
            switch.wait(20.0)
        except subprocess.TimeoutExpired:
            switch.kill()
            switch.wait()


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter a network namespace: {os.strerror(code)}")
