"""Whether this process stood still: stopped, suspended, or without a processor.

Neighbours that heard nothing of it took it for gone and closed their links. It finds them closed when it wakes, and
must not take that for the neighbours' end.
"""

import math
import threading
import time

#: Time between two looks at the clock.
_TICK_S = 0.25
#: For how long after it woke what a stage finds may come from it. It finds closed links at once, or after its step.
_RECENT_S = 1.0


class Clock:
    """The times of looks: a long gap between two is one in which nothing of this process ran. Thread-safe."""

    def __init__(self, least_s: float, now: float) -> None:
        """least_s: the shortest gap that counts."""
        self._least_s = least_s
        self._lock = threading.Lock()
        self._looked, self._woke, self._gap_s = now, -math.inf, 0.0

    def look(self, now: float) -> float:
        """How long it stood still just before; 0 where it did not."""
        with self._lock:
            gap_s = now - self._looked - _TICK_S
            self._looked = now
            if gap_s >= self._least_s:
                self._woke, self._gap_s = now, gap_s
            return self._gap_s if now - self._woke <= _RECENT_S else 0.0


class Standstill:
    """Looks at the clock in a thread of its own, which ends with the process."""

    def __init__(self, silence_s: float) -> None:
        """silence_s: after which neighbours give up; what they heard last may be some time before."""
        self._clock = Clock(silence_s / 2, time.monotonic())
        threading.Thread(target=self._tick, name="standstill", daemon=True).start()

    def seconds(self) -> float:
        """How long this process stood still just before; 0 where it did not. Any thread."""
        return self._clock.look(time.monotonic())

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_S)
            self._clock.look(time.monotonic())
