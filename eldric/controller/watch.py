"""Hands news to everybody who watches, and lets nobody slow the others down."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Generic, TypeVar

from eldric.errors import QueueIsFull

T = TypeVar("T")

#: News that a watcher may be behind.
MAX_BEHIND = 1024


class Watcher(Generic[T]):
    """One reader's news, in order, `first` before all others."""

    def __init__(self, name: str, first: Iterable[T]) -> None:
        self._name = name
        self._news: asyncio.Queue[T] = asyncio.Queue()
        for item in first:
            self._news.put_nowait(item)
        self._most = self._news.qsize() + MAX_BEHIND
        self._behind = False

    def put(self, item: T) -> None:
        if self._news.qsize() >= self._most:
            self._behind = True
        else:
            self._news.put_nowait(item)

    async def follow(self) -> AsyncIterator[T]:
        """Everything from now on. Raises QueueIsFull once a slow reader has missed something."""
        while not self._behind:
            yield await self._news.get()
        raise QueueIsFull(f"this reader is more than {MAX_BEHIND} {self._name} behind: watch again", 0.1)


class Broadcast(Generic[T]):
    """Watchers come and go; each gets everything that is published while it is there."""

    def __init__(self, name: str) -> None:
        """`name`: what is published, in the plural, for messages."""
        self._name = name
        self._watchers: set[Watcher[T]] = set()

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, item: T) -> None:
        for watcher in self._watchers:
            watcher.put(item)

    @contextlib.contextmanager
    def watch(self, first: Iterable[T]) -> Iterator[Watcher[T]]:
        """A watcher that begins with `first`, the state of now: its size is not held against the reader."""
        watcher = Watcher(self._name, first)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
