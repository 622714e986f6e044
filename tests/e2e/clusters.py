"""Local clusters for tests: real processes, as `eldric-cli up` starts them, each below a folder of its own."""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from eldric.cli import processes
from eldric.cli.local import LocalCluster
from eldric.cli.roster import Shape
from eldric.client import AsyncClient
from eldric.client.types import Delta, Event, Finished, PipelineInfo, StageInfo
from eldric.errors import NotFound, Unavailable
from eldric.v1 import stage_pb2, stage_pb2_grpc
from tests.models import SmallLlama, storyteller, write_small_llama

STORY = "story"
#: A model whose generations last as long as a test needs: thousands of tokens, a millisecond or so each.
ENDLESS = "endless"
ENDLESS_LLAMA = SmallLlama(layers=6, context=16384, type="Q8_0")


def container() -> list[str]:
    """A command in front of another, which then runs in a container as far as shared memory is concerned."""
    for options in (["--ipc"], ["--map-root-user", "--ipc"]):
        command = [shutil.which("unshare") or "unshare", *options]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return []


CONTAINER = container() if sys.platform == "linux" else []


@dataclass(slots=True)
class LiveCluster:
    """A cluster that runs. `client` is an operator's."""

    local: LocalCluster
    client: AsyncClient
    restarted: "list[subprocess.Popen[bytes]]" = field(default_factory=list)  # children of this process

    @property
    def folder(self) -> Path:
        return self.local.folder

    async def up(self) -> None:
        """Start what does not run, as `eldric-cli up` does."""
        await asyncio.to_thread(_up, self.local)

    async def down(self) -> list[str]:
        """End every node, as `eldric-cli down` does. Returns the names of those that had to be killed."""
        _, killed = await asyncio.to_thread(self.local.down, _say_nothing)
        return [entry.name for entry in killed]

    def node(self, name: str) -> processes.NodeProcess:
        return next(each for each in self.local.processes() if each.entry.name == name)

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self.node(name).pid)

    def pids(self) -> dict[str, int]:
        return {each.entry.name: each.pid for each in self.local.processes()}

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.node(name).pid, number)

    async def kill(self, name: str) -> None:
        """As kill -9 does; returns when the process is gone."""
        process = self.process(name)
        process.kill()
        await until(lambda: not runs(process))

    async def restart(
        self, worker: str, *, within: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """End a worker, and start it again `within` a command that runs another, and with these variables."""
        command = self.process(worker).cmdline()
        await self.kill(worker)
        with (self.folder / "restarted.log").open("ab") as output:
            process = subprocess.Popen(
                [*within, *command],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.restarted.append(process)
        await self.until_member(worker, process.pid)

    async def until_member(self, worker: str, pid: int, limit_s: float = 15.0) -> None:
        """Until the controller counts that process as up."""
        async with asyncio.timeout(limit_s):
            while (worker, "up", pid) not in [
                (each.name, each.state, each.pid) for each in await self.client.workers()
            ]:
                await asyncio.sleep(0.02)

    @property
    def router_url(self) -> str:
        return self.node("router").http_url

    async def add_story(self) -> None:
        await self.client.models.add(storyteller(), STORY)

    async def add_endless(self) -> None:
        await self.client.models.add(write_small_llama(self.folder / "endless.gguf", ENDLESS_LLAMA), ENDLESS)

    async def deploy_endless(self, stages: int = 3, **options: Any) -> PipelineInfo:
        settings = {"context": ENDLESS_LLAMA.context, "chunk": 64, "slots": 2, **options}
        return await self.client.deploy(ENDLESS, stages=stages, **settings)

    def endless(self, **options: Any) -> AsyncIterator[Event]:
        """A generation of `endless` that goes on for thousands of tokens."""
        return self.client.generate(ENDLESS, "a b", temperature=0.0, ignore_eos=True, **options)

    async def pipeline(self, name: str = ENDLESS) -> PipelineInfo:
        (info,) = await self.client.status(name)
        return info

    async def until_state(self, state: str, name: str = ENDLESS, limit_s: float = 15.0) -> PipelineInfo:
        async with asyncio.timeout(limit_s):
            while (info := await self.pipeline(name)).state != state:
                await asyncio.sleep(0.02)
        return info

    async def stages_held(self, worker: str) -> list[stage_pb2.StageStatus]:
        """What a worker says that it holds."""
        channel = self.client.channel(self.node(worker).grpc_address, "worker", worker)
        answer = await stage_pb2_grpc.StageStub(channel).Status(stage_pb2.StageStatusRequest(), timeout=5.0)
        return list(answer.stages)

    async def until_empty(self, *workers: str, limit_s: float = 10.0) -> None:
        """Until none of these workers holds a stage."""
        async with asyncio.timeout(limit_s):
            for worker in workers:
                while await self.stages_held(worker):
                    await asyncio.sleep(0.02)

    async def until_routed(self, limit_s: float = 5.0) -> None:
        """Until the router answers for `endless`: one that lost its controller may be behind."""
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    await self.client.complete(ENDLESS, "a", max_tokens=1)
                    return
                except (NotFound, Unavailable):
                    await asyncio.sleep(0.05)

    async def slots_used(self, name: str = ENDLESS) -> list[int]:
        """For each stage how many slots are taken, as it says itself; for the head, those who wait for one as well."""
        workers = [stage.worker for stage in (await self.pipeline(name)).stages]
        held = [each for worker in workers for each in await self.stages_held(worker) if each.name == name]
        return [stage.slots_used + stage.queued for stage in held]

    async def until_free(self, name: str = ENDLESS, limit_s: float = 1.5) -> None:
        """Until no slot of the pipeline is taken in any stage: within a second, and what a busy machine adds."""
        async with asyncio.timeout(limit_s):
            while any(await self.slots_used(name)):
                await asyncio.sleep(0.01)

    async def until_taken(self, count: int, name: str = ENDLESS, limit_s: float = 10.0) -> None:
        """Until so many generations run or wait at the head."""
        async with asyncio.timeout(limit_s):
            while (await self.slots_used(name))[0] != count:
                await asyncio.sleep(0.01)

    def http(self, name: str) -> httpx.AsyncClient:
        """An HTTP client of a node, with the operator's certificate."""
        return httpx.AsyncClient(base_url=self.node(name).http_url, verify=self._tls(), timeout=10.0)

    async def metrics(self, name: str) -> dict[tuple[str, ...], float]:
        """A node's metrics: values by name and label values in the order of the label names."""
        async with self.http(name) as client:
            return await metrics_of(client)

    def _tls(self) -> ssl.SSLContext:
        operator = self.client.cluster.operator
        context = ssl.create_default_context(cafile=operator / "ca.pem")
        context.load_cert_chain(operator / "node.pem", operator / "node-key.pem")
        return context


async def metrics_of(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """See LiveCluster.metrics."""
    text = (await client.get("/metrics")).raise_for_status().text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(each.name, *(each.labels[key] for key in sorted(each.labels))): each.value for each in samples}


@contextlib.asynccontextmanager
async def local_cluster(
    folder: Path, workers: int = 3, *, flags: Sequence[str] = (), **shape: Any
) -> AsyncIterator[LiveCluster]:
    """A cluster that ends with the block, whatever was done to it.

    flags: of `eldric-cli worker`, for every worker; shape: other fields of cli.roster.Shape.
    """
    local = LocalCluster.create(folder / "cluster", Shape(workers=workers, threads=1, **shape))
    local.nodes = [
        replace(entry, arguments=(*entry.arguments, *flags)) if entry.kind == "worker" else entry
        for entry in local.nodes
    ]
    restarted: list[subprocess.Popen[bytes]] = []
    try:
        await asyncio.to_thread(_up, local)
        async with AsyncClient(folder=local.folder) as client:
            yield LiveCluster(local, client, restarted)
    finally:
        left = processes.find(map(local.node_folder, local.nodes))
        for pid in left.values():
            os.kill(pid, signal.SIGCONT)
        processes.end(left)
        for process in restarted:
            process.wait(10)


@contextlib.asynccontextmanager
async def attached(folder: Path) -> AsyncIterator[LiveCluster]:
    """A cluster that somebody else started and will end."""
    async with AsyncClient(folder=folder) as client:
        yield LiveCluster(LocalCluster.load(folder), client)


@contextlib.asynccontextmanager
async def endless_on(folder: Path, scratch: Path, **options: Any) -> AsyncIterator[LiveCluster]:
    """A cluster that somebody else started, with `endless` over three stages for as long as the block lasts."""
    async with attached(folder) as cluster:
        await cluster.client.models.add(write_small_llama(scratch / "endless.gguf", ENDLESS_LLAMA), ENDLESS)
        try:
            await cluster.deploy_endless(**options)
            await cluster.until_routed()
            yield cluster
        finally:
            with contextlib.suppress(NotFound):
                await cluster.client.undeploy(ENDLESS)
            await cluster.client.models.remove(ENDLESS)


def _up(local: LocalCluster) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
        local.up(_say_nothing)


def _say_nothing(line: str) -> None:
    pass


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Returns once the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


async def tokens_until(events: AsyncIterator[Event], count: int) -> list[int]:
    """Token ids of a generation, until there are so many or it ends."""
    ids: list[int] = []
    async for event in events:
        if isinstance(event, Delta):
            ids.extend(token.id for token in event.tokens)
        if len(ids) >= count or isinstance(event, Finished):
            return ids
    return ids


def by_worker(info: PipelineInfo) -> dict[str, StageInfo]:
    return {stage.worker: stage for stage in info.stages}


def listening(*pids: int) -> set[int]:
    """Ports that these processes listen on; without any: all that somebody listens on."""
    return {
        getattr(connection.laddr, "port", 0)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and (not pids or connection.pid in pids)
    }


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
