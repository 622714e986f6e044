"""A short wait without sleeping, because a core that went idle takes long to wake (0.05 to 0.5 ms on virtual ones)."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

_BLEND = 8  # the usual wait is a mean in which the last wait counts 1 / _BLEND

Found = TypeVar("Found")

if hasattr(os, "sched_yield"):
    give_way = os.sched_yield
else:

    def give_way() -> None:
        time.sleep(0)


class Spinner:
    """Decides how long to look again and again before sleeping. One for each place to wait at, used by one thread.

    It spins at most `spin_s` at a time, and only while waits are usually shorter than that: where frames come seldom
    it costs nothing. Between two looks it gives the core to whoever else wants it.
    """

    __slots__ = ("_began", "_spin_s", "_usual_s")

    def __init__(self, spin_s: float) -> None:
        """spin_s: seconds; 0 never spins."""
        self._spin_s = spin_s
        self._usual_s = 0.0
        self._began = 0.0

    def wait(self, look: Callable[[], Found | None], deadline: float | None) -> Found | None:
        """What `look` found. None: sleep, then call `slept`. deadline: of time.monotonic, None: no bound."""
        self._began = began = now = time.monotonic()
        if self._usual_s >= self._spin_s:
            return None
        end = began + self._spin_s
        if deadline is not None and deadline < end:
            end = deadline
        while now < end:
            found = look()
            if found:
                self._note(now - began)
                return found
            give_way()
            now = time.monotonic()
        return None

    def slept(self) -> None:
        """A sleep that followed `wait` is over."""
        self._note(time.monotonic() - self._began)

    def _note(self, waited_s: float) -> None:
        """Long waits count as little more than `spin_s`, so that some short ones suffice to spin again."""
        self._usual_s += (min(waited_s, 2 * self._spin_s) - self._usual_s) / _BLEND
