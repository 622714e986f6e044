"""Long work in threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from eldric.data.jobs import Ended, Jobs, Update
from eldric.errors import NotFound, QueueIsFull, Unavailable

Report = Callable[[str, int, int], None]


@pytest.fixture
async def jobs() -> AsyncIterator[Jobs]:
    made = Jobs(running=1, waiting=1)
    yield made
    await made.close(0.0)


async def test_a_job_gives_updates_and_its_result(jobs: Jobs) -> None:
    def work(report: Report) -> str:
        report("hashing", 0, 10)
        report("copying", 10, 10)
        return "done"

    with jobs.start(work) as job:
        updates = [update async for update in job.updates()]
        assert await job.result() == "done"
    assert updates[-1] == Update("copying", 10, 10)


async def test_a_job_raises_what_its_work_raised(jobs: Jobs) -> None:
    def work(report: Report) -> None:
        raise NotFound("nothing here")

    with jobs.start(work) as job, pytest.raises(NotFound, match="nothing here"):
        assert [update async for update in job.updates()] == []
        await job.result()


async def test_many_reports_become_few_updates(jobs: Jobs) -> None:
    def work(report: Report) -> None:
        for done in range(100_000):
            report("hashing", done, 100_000)

    with jobs.start(work) as job:
        assert 0 < len([update async for update in job.updates()]) < 100


async def test_a_job_in_line_says_so_and_more_are_refused(jobs: Jobs) -> None:
    release = threading.Event()
    with jobs.start(lambda report: release.wait(10)), jobs.start(lambda report: 7) as second:
        updates = second.updates()
        assert await anext(updates) == Update("waiting", 0, 0)
        with pytest.raises(QueueIsFull) as caught:
            jobs.start(lambda report: None)
        assert caught.value.retry_after_s > 0
        release.set()
        assert [update async for update in updates] == []
        assert await second.result() == 7
    with jobs.start(lambda report: 8) as third:
        assert await third.result() == 8


async def test_leaving_a_job_ends_its_work(jobs: Jobs) -> None:
    begun, cleaned = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(report: Report) -> None:
        loop.call_soon_threadsafe(begun.set)
        try:
            while True:
                report("hashing", 0, 1)
        finally:
            loop.call_soon_threadsafe(cleaned.set)

    with jobs.start(work):
        await begun.wait()
    async with asyncio.timeout(10):
        await cleaned.wait()


async def test_closing_ends_running_and_waiting_jobs() -> None:
    jobs = Jobs(running=1, waiting=1)

    def work(report: Report) -> None:
        while True:
            report("hashing", 0, 1)

    made = [jobs.start(work) for _ in range(2)]
    async with asyncio.timeout(10):
        await jobs.close(0.01)
    for job in made:
        with pytest.raises(Ended):
            await job.result()
    with pytest.raises(Unavailable):
        jobs.start(work)
