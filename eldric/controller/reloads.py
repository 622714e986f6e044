"""When a pipeline whose stages are gone is loaded again. Pure."""

from dataclasses import dataclass

#: Attempts in a row that may fail; after them nothing is tried until one of the workers is another process.
MAX_ATTEMPTS = 8
#: Longest wait between two attempts, in seconds.
MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class Reloads:
    """Attempts to load one pipeline again: the first at once, the next ones ever more rarely.

    `running`: an attempt is under way. `failures`, `problem`: how many failed in a row, and why the last one did.
    """

    interval_s: float  # the first pause
    running: bool = False
    failures: int = 0
    problem: str = ""
    _due: float | None = None
    _put_off: bool = False
    _processes: tuple[int, ...] = ()

    def take(self, now: float, processes: tuple[int, ...]) -> bool:
        """Whether an attempt is to begin now; then it is running. processes: incarnations of the workers."""
        if self.running:
            return False
        if processes != self._processes:
            self._processes, self._due, self.failures = processes, None, 0
        if self.failures >= MAX_ATTEMPTS:
            return False
        if self._due is None:
            self._due = now + self._pause_s()
        if now < self._due:
            return False
        self.running, self._due, self._put_off = True, None, False
        return True

    def ended(self, problem: str = "") -> None:
        """The attempt is over. Without a problem it could not begin: it counts for nothing, and is put off a little."""
        self.running = False
        if problem:
            self.failures, self.problem = self.failures + 1, problem
        else:
            self._put_off = True

    def succeeded(self) -> None:
        """The pipeline works."""
        self.running, self.failures, self.problem, self._due = False, 0, "", None

    @property
    def story(self) -> str:
        """What came of the attempts, for people; empty when none failed."""
        if not self.failures:
            return ""
        times = "once" if self.failures == 1 else f"{self.failures} times"
        given_up = ", the last attempt: rebalance it, or restart a worker" if self.failures >= MAX_ATTEMPTS else ""
        return f"loading it again failed {times}{given_up}: {self.problem}"

    def _pause_s(self) -> float:
        if not self.failures:
            return self.interval_s if self._put_off else 0.0
        return float(min(MAX_PAUSE_S, self.interval_s * 2 ** (self.failures - 1)))
