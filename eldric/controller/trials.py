"""When better transports are tried for the links of a pipeline. Pure."""

from dataclasses import dataclass

#: Longest wait between two trials, in seconds.
MAX_PAUSE_S = 900.0


@dataclass(slots=True)
class Trials:
    """Trials for one pipeline: the first a while after it is ready, the next ones ever more rarely."""

    interval_s: float  # the first pause
    running: bool = False
    _due: float | None = None
    _pause_s: float = 0.0

    def take(self, now: float, *, ready: bool, idle: bool) -> bool:
        """Whether a trial is to begin now; then it is running. One that is due waits until the pipeline is idle."""
        if self.running:
            return False
        if not ready:
            self._due, self._pause_s = None, 0.0
            return False
        if self._due is None:
            self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s or self.interval_s)
            self._due = now + self._pause_s
        if now < self._due or not idle:
            return False
        self.running, self._due = True, None
        return True

    def ended(self, *, better: bool) -> None:
        """The trial is over. After one that made links better, others may follow soon."""
        self.running = False
        if better:
            self._pause_s = 0.0
