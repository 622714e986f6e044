"""Who may send a model's bytes now: a bounded number at once, fairly shared, and a bounded number that wait.

A free turn goes to the waiting caller that has the fewest, and of those to whoever had none for longest. When too many
wait, the newest of whoever waits most often makes room for a caller that waits less; everybody else is told when to
come again.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from eldric.errors import Busy

#: Longest wait for a turn, in seconds: shorter than callers wait for an answer.
PATIENCE_S = 5.0
#: What callers are told at least and at most when they come too often, in seconds.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 10.0
_MOST_CALLERS = 4096


@dataclass(slots=True, eq=False)
class _Waiting:
    caller: str
    turn: asyncio.Future[None]


class Transfers:
    """Belongs to the event loop."""

    def __init__(self, most: int, most_waiting: int) -> None:
        """most: at once; of one caller half of them."""
        self._most, self._most_waiting = most, most_waiting
        self._share = max(1, most // 2)
        self._running: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self._turns = 0
        self._last_turn: Counter[str] = Counter()  # of each caller, by number
        self._average_s = 0.1  # of the last turns

    @property
    def running(self) -> int:
        return self._running.total()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Waits for a turn, which lasts as long as the block. Raises Busy."""
        await self._wait(caller)
        began = time.monotonic()
        try:
            yield
        finally:
            self._average_s += (time.monotonic() - began - self._average_s) / 16
            self._running[caller] -= 1
            self._running += Counter()  # forgets who has none
            self._grant()

    async def _wait(self, caller: str) -> None:
        waiting = _Waiting(caller, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        if len(self._waiting) > self._most_waiting:
            self._refuse_one()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await waiting.turn
        except TimeoutError:
            raise self._busy() from None
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self._running[caller] -= 1  # it was given and is not taken
            raise
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self.running < self._most:
            chosen = min(self._waiting, key=lambda each: (self._running[each.caller], self._last_turn[each.caller]))
            if self._running[chosen.caller] >= self._share:
                return
            self._waiting.remove(chosen)
            if not chosen.turn.done():
                self._running[chosen.caller] += 1
                self._turns += 1
                if len(self._last_turn) > _MOST_CALLERS:
                    self._last_turn.clear()
                self._last_turn[chosen.caller] = self._turns
                chosen.turn.set_result(None)

    def _refuse_one(self) -> None:
        """Of those whose caller waits most often, the newest."""
        often = Counter(each.caller for each in self._waiting)
        refused = max(reversed(self._waiting), key=lambda each: often[each.caller])
        self._waiting.remove(refused)
        if not refused.turn.done():
            refused.turn.set_exception(self._busy())

    def _busy(self) -> Busy:
        """Says when those who wait now will have had their turn."""
        seconds = len(self._waiting) / self._most * self._average_s
        return Busy("too many transfers at once", min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S))
