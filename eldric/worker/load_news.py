"""What is told of a load, for a caller who may read it more slowly than it comes."""

import asyncio
from collections import deque

from eldric.v1 import stage_pb2


class LoadNews:
    """Progress of one load. Of each phase the newest event waits, so that a slow reader hears of every phase."""

    def __init__(self) -> None:
        self._waiting: deque[stage_pb2.LoadProgress] = deque()
        self._changed = asyncio.Event()
        self._over = False

    def tell(self, event: stage_pb2.LoadProgress) -> None:
        if self._waiting and self._waiting[-1].phase == event.phase:
            self._waiting.pop()
        self._waiting.append(event)
        self._changed.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._changed.set()

    async def next(self) -> stage_pb2.LoadProgress | None:
        """The oldest event that waits; None after the last."""
        while not self._waiting:
            if self._over:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()
