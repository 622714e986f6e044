"""News for many readers: in order, from the state of now on, and none waits for a slow one."""

import asyncio

import pytest

from eldric.controller.watch import MAX_BEHIND, Broadcast
from eldric.errors import QueueIsFull


async def test_a_watcher_gets_the_state_of_now_and_then_all_news_in_order() -> None:
    news: Broadcast[int] = Broadcast("numbers")
    news.publish(0)
    with news.watch([1, 2]) as watcher:
        news.publish(3)
        follow = watcher.follow()
        assert [await anext(follow) for _ in range(3)] == [1, 2, 3]
        waiting = asyncio.ensure_future(anext(follow))
        await asyncio.sleep(0)
        news.publish(4)
        assert await waiting == 4
    assert len(news) == 0


async def test_a_slow_reader_loses_its_stream_and_nobody_else_does() -> None:
    news: Broadcast[int] = Broadcast("numbers")
    first = range(2 * MAX_BEHIND)  # the state of now may be larger than what a reader may be behind
    with news.watch(first) as slow, news.watch([]) as quick:
        quick_follow = quick.follow()
        for number in range(MAX_BEHIND + 1):
            news.publish(number)
            assert await anext(quick_follow) == number
        with pytest.raises(QueueIsFull, match="behind: watch again"):
            async for _ in slow.follow():
                pass
