"""Several generations, one reader: order, joining for slow readers, failures and cancelling."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from eldric.errors import QueueIsFull, Unavailable
from eldric.router.feed import Feed
from eldric.router.generation import Delta, Event, Finished, Started, Token

END = Finished("stop", "", 1, 1, 0.0, 0.0, 0.0)


class Script:
    """A generation that gives events; an exception among them is raised, and an asyncio.Event waited for."""

    def __init__(self, *events: Event | Exception | asyncio.Event) -> None:
        self.closed = False
        self._events = events

    async def run(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self._events:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, asyncio.Event):
                    await event.wait()
                else:
                    yield event
        finally:
            self.closed = True


def word(text: str, count: int = 1) -> Delta:
    return Delta(text, (Token(count, None, ()),), count)


STARTED = Started("r", 1, "p")


async def taken(feed: Feed, count: int) -> list[tuple[int, Event]]:
    events: list[tuple[int, Event]] = []
    while len(events) < count:
        events += await feed.take()
    return events


async def test_deltas_are_joined_while_the_reader_is_away() -> None:
    gate = asyncio.Event()
    script = Script(STARTED, word("a", 1), word("b", 2), gate, word("c", 3), END)
    async with Feed([script.run()]) as feed:
        assert await feed.start() == [STARTED]
        await asyncio.sleep(0)
        assert await feed.take() == [(0, Delta("ab", (Token(1, None, ()), Token(2, None, ())), 2))]
        gate.set()
        assert await taken(feed, 2) == [(0, word("c", 3)), (0, END)]
    assert script.closed


async def test_generations_are_joined_each_for_itself() -> None:
    scripts = [Script(STARTED, word("a", 1), word("b", 2), END), Script(STARTED, word("x", 1), word("y", 2), END)]
    async with Feed([script.run() for script in scripts]) as feed:
        assert len(await feed.start()) == 2
        events = await taken(feed, 4)
    for index, text in ((0, "ab"), (1, "xy")):
        mine = [event for at, event in events if at == index]
        assert isinstance(mine[0], Delta)
        assert (mine[0].text, mine[1:]) == (text, [END])


async def test_a_refusal_stops_what_had_started_already() -> None:
    forever = asyncio.Event()
    scripts = [Script(STARTED, forever), Script(QueueIsFull("full"))]
    async with Feed([script.run() for script in scripts]) as feed:
        with pytest.raises(QueueIsFull):
            await feed.start()
    assert all(script.closed for script in scripts)


async def test_a_failure_is_raised_after_what_came_before_it() -> None:
    scripts: Sequence[Script] = [Script(STARTED, word("a"), Unavailable("gone")), Script(STARTED, asyncio.Event())]
    async with Feed([script.run() for script in scripts]) as feed:
        await feed.start()
        await asyncio.sleep(0)
        assert await feed.take() == [(0, word("a"))]
        with pytest.raises(Unavailable):
            await feed.take()
    assert all(script.closed for script in scripts)


async def test_leaving_cancels_what_runs() -> None:
    script = Script(STARTED, asyncio.Event(), END)
    async with Feed([script.run()]) as feed:
        await feed.start()
    assert script.closed
    assert len(asyncio.all_tasks()) == 1
