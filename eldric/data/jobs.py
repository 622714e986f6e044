"""Long work in threads: bounded, with progress for the event loop, and an end on request."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Self, TypeVar

from eldric.errors import QueueIsFull, Unavailable

Result = TypeVar("Result")
#: Work gets a function to report to: what is being done, bytes done, bytes in all.
Work = Callable[[Callable[[str, int, int], None]], Result]

#: Seconds between two updates of one phase.
UPDATE_INTERVAL_S = 0.1


class Update(NamedTuple):
    """How far a job is. phase: "waiting" until it begins, then the work's own words."""

    phase: str
    done_bytes: int
    total_bytes: int


class Ended(Unavailable):
    """Raised inside work that nobody waits for any more: it cleans up and ends."""


class Job(Generic[Result]):
    """One piece of work in a thread. Use it as a context: leaving the block ends the work, if it has not ended."""

    def __init__(self, executor: Executor, work: Work[Result], waits: bool, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._latest = Update("waiting", 0, 0) if waits else None
        self._ended = threading.Event()
        self._phase, self._reported_at = "", 0.0
        self.future = self._loop.run_in_executor(executor, self._run, work)
        self.future.add_done_callback(self._done)
        if waits:
            self._news.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    async def updates(self) -> AsyncIterator[Update]:
        """The newest update whenever there is one, until the work has ended. A slow reader misses some."""
        while not self.future.done():
            await self._news.wait()
            self._news.clear()
            latest, self._latest = self._latest, None
            if latest:
                yield latest

    async def result(self) -> Result:
        """What the work returned or raised."""
        return await asyncio.shield(self.future)

    def end(self) -> None:
        """Asks the work to end: its next report raises Ended, and what it waits for may be cut off."""
        self._ended.set()
        self._on_end()

    def _run(self, work: Work[Result]) -> Result:
        self._check()
        return work(self._report)

    def _check(self) -> None:
        if self._ended.is_set():
            raise Ended("the data worker is ending, or the caller has gone")

    def _report(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """In the work's thread."""
        self._check()
        now = time.monotonic()
        if phase == self._phase and now - self._reported_at < UPDATE_INTERVAL_S:
            return
        self._phase, self._reported_at = phase, now
        self._loop.call_soon_threadsafe(self._show, Update(phase, done_bytes, total_bytes))

    def _show(self, update: Update) -> None:
        self._latest = update
        self._news.set()

    def _done(self, future: asyncio.Future[Result]) -> None:
        if not future.cancelled():
            future.exception()  # looked at: nothing to warn of when the caller has gone
        self._news.set()


class Jobs:
    """Runs jobs: at most `running` at once, and `waiting` more in line."""

    def __init__(self, running: int, waiting: int) -> None:
        self._executor = ThreadPoolExecutor(running, thread_name_prefix="data-job")
        self._running, self._limit = running, running + waiting
        self._jobs: set[Job[Any]] = set()
        self._closing = False

    def start(self, work: Work[Result], on_end: Callable[[], None] = lambda: None) -> Job[Result]:
        """Starts work. on_end: called when nobody waits for it. Raises QueueIsFull, Unavailable after close."""
        if self._closing:
            raise Unavailable("the data worker is ending")
        if len(self._jobs) >= self._limit:
            raise QueueIsFull(f"{len(self._jobs)} imports and checks are in progress: try again later", 10.0)
        job = Job(self._executor, work, len(self._jobs) >= self._running, on_end)
        self._jobs.add(job)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    async def close(self, grace_s: float) -> None:
        """Gives the jobs `grace_s` seconds, then ends them and waits until they have cleaned up."""
        self._closing = True
        futures = [job.future for job in self._jobs]
        if futures:
            await asyncio.wait(futures, timeout=grace_s)
        for job in self._jobs:
            job.end()
        if futures:
            await asyncio.wait(futures)
        self._executor.shutdown(wait=False)
