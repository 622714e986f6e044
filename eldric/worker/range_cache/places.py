"""How the data workers of a fetch are doing: whom to ask now, whom later, whom no more. Pure."""

import random
from dataclasses import dataclass, field

from eldric.errors import DataLoss, EldricError, NotReady, QueueIsFull, Unavailable

#: Pauses after failures in a row, in seconds: each twice the last one.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
#: A data worker that has not been reached for so long is given up, and one that has been too busy for so long.
UNREACHABLE_S, BUSY_S = 10.0, 100.0
#: Wrong answers after which a data worker is asked no more.
MOST_WRONG = 3


@dataclass(slots=True)
class Place:
    """One data worker. It is asked from `not_before` on, until there is a `problem`: then no more."""

    node_id: str
    failures: int = 0  # since the last success
    wrong: int = 0
    failing_since: float | None = None
    not_before: float = 0.0
    problem: EldricError | None = None
    draws: random.Random = field(default_factory=random.Random)

    def succeeded(self) -> None:
        self.failures, self.failing_since = 0, None

    def failed(self, error: EldricError, now: float) -> None:
        """Take note of a failure, and leave it alone for a while; jitter keeps callers apart."""
        self.failures += 1
        self.failing_since = now if self.failing_since is None else self.failing_since
        patience_s = BUSY_S if isinstance(error, QueueIsFull) else UNREACHABLE_S
        self.wrong += isinstance(error, DataLoss)
        if isinstance(error, NotReady) or self.wrong >= MOST_WRONG or now - self.failing_since >= patience_s:
            self.problem = error
        pause_s = min(FIRST_PAUSE_S * 2 ** min(self.failures - 1, 10), LONGEST_PAUSE_S)
        if isinstance(error, QueueIsFull):
            pause_s = error.retry_after_s
        self.not_before = now + pause_s * (1 + self.draws.random() / 2)


def reason_of(error: EldricError) -> str:
    """The failure's name in metrics."""
    match error:
        case QueueIsFull():
            return "busy"
        case DataLoss():
            return "wrong_answer"
        case Unavailable():
            return "unreachable"
    return "refused"


def all_given_up(model: str, places: list[Place]) -> EldricError:
    """What a fetch fails with when nobody is left to ask."""
    problems = [place.problem for place in places if place.problem is not None]
    said = "; ".join(f"{place.node_id}: {place.problem}" for place in places if place.problem is not None)
    text = f"no data worker gives {model!r}: {said or 'none holds it'}"
    if any(isinstance(problem, DataLoss) for problem in problems):
        return DataLoss(text)
    if problems and all(isinstance(problem, NotReady) for problem in problems):
        return NotReady(text)
    return Unavailable(text)
