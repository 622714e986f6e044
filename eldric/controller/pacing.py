"""How fast workers turned out to be: from what their stages read for a token, and how long that took. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Decode steps that a stage must have computed before its time says anything.
FEWEST_STEPS = 16
#: Workers that differ by less are taken for equally fast: times of shared machines do.
_NOTEWORTHY = 1.25
#: Pace of the fastest worker; those of the others are multiples of its hundredth.
_FASTEST = 100


@dataclass(frozen=True, slots=True)
class Measured:
    """A stage at work: bytes that it reads for a token, and the median time of its last decode steps."""

    worker: str
    read_bytes: int
    step_ms: float
    steps: int


def paces(stages: Iterable[Measured], workers: Iterable[str]) -> Mapping[str, int]:
    """What reading a byte costs on each of the workers, as WorkerView.pace; empty where they are equally fast, or where
    that is not known yet. Workers without a stage are taken for ordinary ones."""
    read: dict[str, int] = defaultdict(int)
    took: dict[str, float] = defaultdict(float)
    for stage in stages:
        if stage.steps < FEWEST_STEPS or stage.step_ms <= 0:
            return {}
        read[stage.worker] += stage.read_bytes
        took[stage.worker] += stage.step_ms
    costs = {worker: took[worker] / read[worker] for worker in read}
    if not costs or max(costs.values()) < _NOTEWORTHY * min(costs.values()):
        return {}
    fastest, ordinary = min(costs.values()), statistics.median(costs.values())
    return {worker: round(_FASTEST * costs.get(worker, ordinary) / fastest) for worker in workers}
