"""A node that has no open files or threads left: it waits for some, at rest, and says so."""

import asyncio
import json
import resource
import socket
import ssl
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from eldric.errors import NotReady
from eldric.security import Authority, Identity
from tests.nodes import make_node
from tests.workers import until

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's"),
]

#: Connections beyond those that the node has files for.
STRANGERS = 30


async def test_a_node_without_open_files_rests_says_so_and_goes_on(tmp_path: Path) -> None:
    authority = Authority.create("test")
    authority.save(tmp_path / "authority")
    operator = authority.issue_identity("client", "tester")
    command = [sys.executable, "-m", "tests.nodes", str(tmp_path)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        await until(lambda: (tmp_path / "node.json").exists())
        url = json.loads((tmp_path / "node.json").read_text())["http_url"]
        host, port = url.removeprefix("https://").rsplit(":", 1)
        node = psutil.Process(process.pid)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (node.num_fds() + 2, before[1]))
        with ExitStack() as strangers:
            for _ in range(STRANGERS):
                strangers.enter_context(socket.create_connection((host, int(port))))
            assert process.stderr is not None
            async with asyncio.timeout(10):
                said = await process.stderr.readline()
            assert b"event=connections_wait error='Too many open files' open_files_limit=" in said
            began = node.cpu_times()
            await asyncio.sleep(2.0)  # two more tries
            ended = node.cpu_times()
            assert ended.user + ended.system - began.user - began.system < 0.5
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
            answer = await asyncio.to_thread(_get, host, int(port), operator)
        assert b" 200 OK" in answer
    finally:
        process.terminate()
        _, rest = await asyncio.wait_for(process.communicate(), 10)
    assert not rest, "it says it once"


async def test_a_node_that_may_open_too_few_files_says_so_at_its_start(tmp_path: Path) -> None:
    Authority.create("test").save(tmp_path / "authority")
    command = f"ulimit -n 20 && exec {sys.executable} -m tests.nodes {tmp_path}"
    process = await asyncio.create_subprocess_shell(command, stderr=asyncio.subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert b"NotReady: a node needs 64 open files, it may have 20: raise the limit" in said
    assert process.returncode == 1 and not (tmp_path / "node.json").exists()


async def test_a_node_that_may_have_too_few_threads_says_so_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_few(thread: threading.Thread) -> None:
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    node = make_node(tmp_path, Authority.create("test"))
    monkeypatch.setattr(threading.Thread, "start", start_few)
    with pytest.raises(NotReady, match="can't start new thread: a node needs 16; raise the limit"):
        await node.run()
    assert len(started) == 5 and not any(thread.is_alive() for thread in started)


def _get(host: str, port: int, identity: Identity) -> bytes:
    context = identity.client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_connection((host, port), 10) as plain, context.wrap_socket(plain) as secured:
        secured.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return secured.recv(4096)
