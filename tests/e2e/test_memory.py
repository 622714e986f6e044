"""What processes hold: a worker its shard and no more, and after many requests everybody what it held before."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from eldric.client import AsyncClient
from eldric.client.types import Delta
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, shard_of
from eldric.engine.spec import spec_of
from tests.e2e.clusters import LiveCluster, attached, metrics_of, until
from tests.e2e.conftest import STORY, Cluster
from tests.models import smollm2

MIB = 1 << 20
SMOL = "smol"

#: Requests of the long run; set it to tens of thousands to look for slow leaks.
REQUESTS = int(os.environ.get("ELDRIC_SOAK_REQUESTS", "2000"))
AT_ONCE = 12


@pytest.fixture
async def live(cluster: Cluster) -> AsyncIterator[LiveCluster]:
    async with attached(cluster.folder) as made:
        yield made


@pytest.fixture
async def smol(live: LiveCluster) -> AsyncIterator[Path]:
    """The file of a real model of 98 MB, in the store."""
    await live.client.models.add(smollm2(), SMOL)
    (path,) = (live.folder / "models").rglob("*mol*.gguf")
    yield path
    with contextlib.suppress(Exception):
        await live.client.undeploy(SMOL)
    await live.client.models.remove(SMOL)


def resident_bytes(pid: int, path: Path) -> int:
    """Pages of a file that a process has mapped and that are in memory, in bytes (proc(5), smaps)."""
    total, of_file = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            of_file = len(rest) == 5 and rest[4] == str(path)
        elif of_file and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


def shard_bytes(path: Path, layers: tuple[int, int]) -> int:
    with ModelFile.open(path) as model:
        return shard_of(model, spec_of(model), LayerRange(*layers)).nbytes


@pytest.mark.model
@pytest.mark.parametrize("weights", ["mapped", "auto"])
async def test_a_worker_holds_its_shard_of_the_file_and_gives_it_back(
    live: LiveCluster, smol: Path, weights: str
) -> None:
    pids = live.pids()
    before = {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}
    info = await live.client.deploy(SMOL, stages=3, weights=weights, context=256, slots=2)
    answer = await live.client.complete(SMOL, "The sea is", max_tokens=8, temperature=0.0)
    assert len(answer.tokens) == 8
    for stage in info.stages:
        shard, resident = shard_bytes(smol, stage.layers), resident_bytes(stage.pid, smol)
        assert resident <= 1.02 * shard, f"{stage.worker} holds pages of others' layers"
        if weights == "mapped":
            assert resident >= 0.98 * shard, "every weight was read in place"
    await live.client.undeploy(SMOL)
    for stage in info.stages:
        assert resident_bytes(stage.pid, smol) == 0
        worker, most = psutil.Process(stage.pid), before[stage.worker] + 8 * MIB
        await until(lambda worker=worker, most=most: worker.memory_info().rss < most)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds besides its memory."""

    threads: int
    files: int
    tasks: float  # of its event loop


class Holdings:
    """Looks at what every node holds. Its own connections stay open from one look to the next and so count in each.

    With a new one for each look, a node held one descriptor more in half of the looks at it (25 to 35 of 60; 55 of 60
    at the router): that of the look before, which it had not closed yet. A first look without it made all others fail.
    """

    def __init__(self, live: LiveCluster, faces: dict[str, httpx.AsyncClient]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in live.pids().items()}
        self._faces = faces

    async def look(self) -> dict[str, Held]:
        found = {}
        for name, process in self._processes.items():
            tasks = (await metrics_of(self._faces[name]))["eldric_tasks",]
            found[name] = Held(process.num_threads(), process.num_fds(), tasks)
        return found

    async def until_no_more_than(self, before: dict[str, Held]) -> None:
        """Until nobody holds more than before. The clients' connections have just been closed: it takes a moment."""
        more: dict[str, tuple[Held, Held]] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while True:
                    after = await self.look()
                    more = {name: (before[name], now) for name, now in after.items() if _is_more(now, before[name])}
                    if not more:
                        return
                    await asyncio.sleep(0.1)
        raise AssertionError(f"held before and now: {more}")


@contextlib.asynccontextmanager
async def holdings(live: LiveCluster) -> AsyncIterator[Holdings]:
    async with contextlib.AsyncExitStack() as stack:
        yield Holdings(live, {name: await stack.enter_async_context(live.http(name)) for name in live.pids()})


def resident(live: LiveCluster) -> dict[str, int]:
    return {name: psutil.Process(pid).memory_info().rss for name, pid in live.pids().items()}


async def by_grpc(client: AsyncClient, number: int, leave: bool) -> None:
    events = client.generate(STORY, "Once upon a time", max_tokens=100 if leave else 3, seed=number)
    async with contextlib.aclosing(events) as stream:
        async for event in stream:
            if leave and isinstance(event, Delta):
                return


async def by_openai(client: openai.AsyncOpenAI, number: int, leave: bool) -> None:
    tell: Any = [{"role": "user", "content": "Tell me a story."}]
    limit = 100 if leave else 3
    stream = await client.chat.completions.create(
        model=STORY, messages=tell, max_tokens=limit, seed=number, stream=leave or number % 2 == 0
    )
    if isinstance(stream, openai.AsyncStream):
        async with stream:
            async for chunk in stream:
                if leave and chunk.choices and chunk.choices[0].delta.content:
                    return


Request = Callable[[int, bool], Coroutine[Any, Any, None]]


async def send(numbers: Iterator[int], requests: list[Request]) -> None:
    """Takes numbers and sends requests, to one client after the other; leaves every third midway."""
    for number in numbers:
        await requests[number % len(requests)](number, number // len(requests) % 3 == 2)


@pytest.mark.timeout(60 + REQUESTS // 10)
async def test_thousands_of_requests_leave_nothing_behind(live: LiveCluster) -> None:
    async with holdings(live) as everybody, contextlib.AsyncExitStack() as clients:
        requests: list[Request] = []
        for _ in range(2):
            ours = await clients.enter_async_context(AsyncClient(folder=live.folder))
            theirs = openai.AsyncOpenAI(base_url=f"{live.router_url}/v1", api_key="any", max_retries=0)
            await clients.enter_async_context(theirs)
            requests += [
                lambda number, leave, client=ours: by_grpc(client, number, leave),  # type: ignore[misc]
                lambda number, leave, client=theirs: by_openai(client, number, leave),  # type: ignore[misc]
            ]
        numbers = iter(range(REQUESTS))

        async def run(count: int) -> None:
            some = iter([number for number, _ in zip(numbers, range(count), strict=False)])
            await asyncio.gather(*(send(some, requests) for _ in range(AT_ONCE)))

        await run(REQUESTS // 10)
        await live.until_free(STORY)
        before = await everybody.look()
        await run(REQUESTS * 4 // 10)
        middle = resident(live)
        await run(REQUESTS // 2)
        end = resident(live)
        await live.until_free(STORY)
        await clients.aclose()
        await everybody.until_no_more_than(before)
    for name, nbytes in end.items():
        assert nbytes <= 1.02 * middle[name], f"{name} grew from {middle[name]} to {nbytes} bytes"
    generations = await live.metrics((await live.pipeline(STORY)).stages[0].worker)
    assert generations["eldric_live_generations", STORY] == 0
    assert generations["eldric_generations_total", STORY, "cancelled"] >= REQUESTS // 4


def _is_more(now: Held, before: Held) -> bool:
    return now.threads > before.threads or now.files > before.files or now.tasks > before.tasks
