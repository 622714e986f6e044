"""How many generations a router takes on at once."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from eldric.router.errors import RouterDraining, RouterIsFull


class Admission:
    """Counts generations, refuses those above the limit, and tells when the last has ended."""

    def __init__(self, limit: int, draining: Callable[[], bool]) -> None:
        self._limit = limit
        self._draining = draining
        self._idle = asyncio.Event()
        self._idle.set()
        self.active = 0

    @contextlib.contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Around `count` generations. Raises RouterDraining, RouterIsFull."""
        if self._draining():
            raise RouterDraining
        if self.active + count > self._limit:
            raise RouterIsFull(f"this router takes {self._limit} generations at once, and {self.active} run")
        self.active += count
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= count
            if not self.active:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when nothing runs."""
        await self._idle.wait()
