"""The generations of one request, side by side, for one reader."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self

from eldric.router.generation import Delta, Event, Started

Generation = AsyncGenerator[Event, None]


class Feed:
    """Reads generations as fast as they come, and keeps what the reader has not taken: deltas of one generation are
    joined, so a slow client gets fewer and longer ones. Use in `async with`; leaving it cancels what still runs."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self._tasks: list[asyncio.Task[None]] = []
        self._pending: list[tuple[int, Event]] = []
        self._last: dict[int, int] = {}  # where in `_pending` a generation's newest delta is
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for generation in self._generations:
            with contextlib.suppress(Exception):
                await generation.aclose()

    async def start(self) -> list[Started]:
        """Returns when a head has taken each generation. Raises what the first refusal was."""
        starts = [asyncio.ensure_future(_started(each)) for each in self._generations]
        try:
            started = await asyncio.gather(*starts)
        finally:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
        self._tasks = [asyncio.create_task(self._read(*each)) for each in enumerate(self._generations)]
        return started

    async def take(self) -> list[tuple[int, Event]]:
        """(index of the generation, event) of everything since the last call, at least one. Raises the error of a
        generation that failed, once what came before it was taken."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._pending:
            taken, self._pending, self._last = self._pending, [], {}
            if self._failure is not None:
                self._arrived.set()
            return taken
        raise self._failure or RuntimeError("nothing came and nothing failed")

    async def _read(self, index: int, generation: Generation) -> None:
        try:
            async for event in generation:
                self._put(index, event)
        except Exception as error:
            self._failure = self._failure or error
            self._arrived.set()

    def _put(self, index: int, event: Event) -> None:
        at = self._last.get(index)
        if at is not None and isinstance(event, Delta):
            before = self._pending[at][1]
            if isinstance(before, Delta):
                event = Delta(before.text + event.text, before.tokens + event.tokens, event.settled)
                self._pending[at] = (index, event)
                return
        if isinstance(event, Delta):
            self._last[index] = len(self._pending)
        self._pending.append((index, event))
        self._arrived.set()


async def _started(generation: Generation) -> Started:
    event = await anext(generation)
    if not isinstance(event, Started):
        raise RuntimeError(f"a generation begins with {type(event).__name__}")
    return event
