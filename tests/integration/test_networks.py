"""The networks that tests and benchmarks run on do what they say, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import memory_groups
from benchmarks.network import Network, NetworkUnavailable, network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ECHO = """
import socket, sys
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        while got := connection.recv(1 << 20):
            connection.sendall(got)
"""


@pytest.fixture
def net() -> Iterator[Network]:
    with network("here", "there", "behind", rate_bits=200e6, delay_ms=5.0, closed=["behind"]) as made:
        yield made


def echo(net: Network, host: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(net.command(host, [sys.executable, "-c", ECHO]), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process


def trip(connection: socket.socket, nbytes: int) -> float:
    began, left = time.perf_counter(), nbytes
    connection.sendall(bytes(nbytes))
    while left:
        left -= len(connection.recv(min(left, 1 << 20)))
    return time.perf_counter() - began


def connect(net: Network, host: str, timeout: float = 5.0) -> socket.socket:
    connection = socket.create_connection((net.addresses[host], 5000), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def test_links_have_their_delay_and_their_rate_and_count_bytes(net: Network) -> None:
    server = echo(net, "there")
    before = net.sent_bytes("here")
    with net.inside("here"), connect(net, "there") as connection:
        trip(connection, 1)
        fastest = min(trip(connection, 1) for _ in range(10))
        assert 0.010 <= fastest < 0.020
        # The echo comes back while the rest goes out: 2 MB one way take 80 ms at least.
        assert trip(connection, 2_000_000) > 0.08
    assert 2_000_000 <= net.sent_bytes("here") - before < 2_000_000 * 1.05
    server.kill()
    server.wait()


def test_hosts_reach_nothing_else(net: Network) -> None:
    with net.inside("here"), pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 80), 1.0)


def test_nobody_opens_a_connection_to_a_closed_host_and_it_does_to_others(net: Network) -> None:
    servers = [echo(net, "behind"), echo(net, "there")]
    with net.inside("here"), pytest.raises(TimeoutError):
        connect(net, "behind", timeout=0.5)
    with net.inside("behind"), connect(net, "there") as connection:
        trip(connection, 1000)
    for server in servers:
        server.kill()
        server.wait()


def test_cut_link_loses_frames_until_it_is_mended(net: Network) -> None:
    server = echo(net, "there")
    with net.inside("here"), connect(net, "there") as connection:
        trip(connection, 1)
        net.cut("there")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            trip(connection, 1)
        net.mend("there")
        connection.settimeout(10.0)
        assert connection.recv(1) == b"\0"  # TCP sends it again
    server.kill()
    server.wait()


def test_memory_of_a_host_is_limited(net: Network) -> None:
    try:
        net.limit_memory("here", 64 << 20)
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    take = "print(len(bytearray(b'x') * (%d << 20)))"
    small = subprocess.run(net.command("here", [sys.executable, "-c", take % 20]), capture_output=True)
    assert small.returncode == 0
    large = subprocess.run(net.command("here", [sys.executable, "-c", take % 100]), capture_output=True)
    assert large.returncode == -signal.SIGKILL
    (group,) = net.memory_groups("here")
    assert memory_groups.kills(group) == 1
    assert memory_groups.peak_bytes(group) > 60 << 20


def test_hidden_folder_is_empty_there_and_nowhere_else(net: Network, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    net.hide("here", tmp_path)
    listed = [
        subprocess.run(net.command(host, ["ls", str(tmp_path)]), capture_output=True, text=True, check=True).stdout
        for host in ("here", "there")
    ]
    assert listed == ["", "file\n"]


def test_nothing_is_left_of_a_network_whose_owner_was_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        pid, switch, group = owner.stdout.readline().split()
    assert os.path.exists(f"/proc/{pid}") and os.path.exists(group)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10.0
    while _is_alive(pid) or _is_alive(switch) or os.path.exists(group):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.02)


OWNER = """
import subprocess, time
from benchmarks.network import network
with network("alone") as net:
    net.limit_memory("alone", 50 << 20)
    child = subprocess.Popen(net.command("alone", ["sleep", "100"]), start_new_session=True)
    print(child.pid, net._switch.pid, *net.memory_groups("alone"), flush=True)
    time.sleep(100)
"""


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
