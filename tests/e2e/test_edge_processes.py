"""An edge and a worker behind it as processes, made by the command line; the edge is killed and restarted."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldric import node_file
from eldric.client.types import Answer
from eldric.names import split_address
from eldric.security import Authority
from tests.e2e.clusters import STORY, LiveCluster, local_cluster, until

PROMPT = "Once upon a time"


def spawn(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "eldric.cli.main", *map(str, arguments), "--quiet"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


@dataclass
class Edged:
    """A cluster of one worker with an edge, and another worker behind that."""

    cluster: LiveCluster
    folder: Path
    edge: "subprocess.Popen[bytes]"
    document: dict[str, Any]

    async def restart_edge(self) -> None:
        """As if the machine had lost its power."""
        self.edge.send_signal(signal.SIGKILL)
        self.edge.wait()
        ports = [f"--{kind}-port={split_address(self.document[f'{kind}_address'])[1]}" for kind in ("grpc", "join")]
        self.edge = await start_edge(self.cluster, self.folder, *ports)

    async def until_member(self) -> None:
        async with asyncio.timeout(20):
            while {node.name: node.state for node in await self.cluster.client.nodes()}.get("home") != "up":
                await asyncio.sleep(0.05)

    async def tell(self) -> Answer:
        return await self.cluster.client.complete(STORY, PROMPT, max_tokens=40, temperature=0.0)


async def start_edge(cluster: LiveCluster, folder: Path, *ports: str) -> "subprocess.Popen[bytes]":
    (controller,) = cluster.local.controllers
    home = folder / "edge"
    (home / node_file.NAME).unlink(missing_ok=True)
    process = spawn("edge", "--folder", home, "--controller", controller, "--http-port", 0, *ports)
    await until(lambda: (node_file.read(home) or {}).get("join_address"), 20)
    return process


@contextlib.asynccontextmanager
async def edged(folder: Path) -> AsyncIterator[Edged]:
    async with local_cluster(folder, workers=1) as cluster:
        authority = Authority.load(cluster.folder / "controller" / "authority")
        authority.issue_identity("edge", "edge").save(folder / "edge")
        made = Edged(cluster, folder, await start_edge(cluster, folder, "--grpc-port=0", "--join-port=0"), {})
        worker: subprocess.Popen[bytes] | None = None
        try:
            made.document = node_file.read(folder / "edge") or {}
            worker = await start_worker(made)
            await made.until_member()
            yield made
        finally:
            for process in filter(None, (worker, made.edge)):
                process.terminate()
                process.wait(15)


async def start_worker(made: Edged) -> "subprocess.Popen[bytes]":
    """Joins at the edge with a token, and starts by what `join` says."""
    token = await made.cluster.client.create_token()
    edge, home = made.document["grpc_address"], made.folder / "home"
    joining = ["join", token, made.document["join_address"], "--name", "home", "--edge", edge, "--folder", str(home)]
    command = [sys.executable, "-m", "eldric.cli.main", *joining, "--json"]
    done = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, check=True)
    program, *arguments = json.loads(done.stdout)["command"].split()
    assert (program, arguments) == ("eldric-cli", ["worker", "--folder", str(home), "--edge", edge])
    return spawn(*arguments, "--http-port", 0, "--grpc-port", 0, "--memory", "1GB", "--threads", 1)


async def test_a_worker_behind_an_edge_serves_and_survives_the_edge(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
    async with edged(tmp_path) as made:
        client = made.cluster.client
        await made.cluster.add_story()
        await client.deploy(STORY, stages=1)
        alone = await made.tell()
        await client.undeploy(STORY)
        info = await client.deploy(STORY, stages=2, transport="relay")
        assert {stage.worker for stage in info.stages} == {"home", "worker-1"}
        assert {stage.transport for stage in info.stages} == {"relay"}
        assert (await made.tell()).tokens == alone.tokens
        await made.restart_edge()
        await made.until_member()
        await made.cluster.until_state("ready", STORY, 30)
        assert (await made.tell()).tokens == alone.tokens
