"""How far the load of a pipeline's stages is, told often enough and no more."""

import time
from collections.abc import Callable, Sequence

from eldric.controller.pipelines import StageRecord
from eldric.v1 import pipeline_pb2

#: Least time between two events of one stage in the same phase, in seconds.
EVENT_INTERVAL_S = 0.1
#: The phases that take the time. What is fetched is mapped afterwards, in a tenth of the time or less.
_FETCHING, _MAPPING = "fetching", "mapping"
_FETCHED_SHARE = 0.9


class Progress:
    """Collects what the stages say; `tell` gets each stage's progress, `note` a line and the whole's share, 0 to 1."""

    def __init__(
        self,
        stages: Sequence[StageRecord],
        tell: Callable[[pipeline_pb2.StageProgress], None],
        note: Callable[[str, float], None],
    ) -> None:
        self._weights = [stage.weights_bytes for stage in stages]
        self._shares = [0.0] * len(stages)
        self._fetched = [0.0] * len(stages)  # the share of a stage that was fetched before it is mapped
        self._phases = [""] * len(stages)
        self._told_at = [0.0] * len(stages)
        self._tell = tell
        self._note = note

    def report(self, stage: StageRecord, phase: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        index, now = stage.index, time.monotonic()
        is_new = phase != self._phases[index]
        if not is_new and now - self._told_at[index] < EVENT_INTERVAL_S and done_bytes < total_bytes:
            return
        self._phases[index], self._told_at[index] = phase, now
        share = done_bytes / total_bytes if total_bytes else 0.0
        if phase == _FETCHING:
            self._fetched[index] = _FETCHED_SHARE
            self._shares[index] = _FETCHED_SHARE * share
        elif phase == _MAPPING:
            self._shares[index] = self._fetched[index] + (1 - self._fetched[index]) * share
        else:
            self._shares[index] = 1.0
        self._tell(
            pipeline_pb2.StageProgress(
                index=index, worker=stage.worker, phase=phase, done_bytes=done_bytes, total_bytes=total_bytes
            )
        )
        done = sum(share * weight for share, weight in zip(self._shares, self._weights, strict=True))
        self._note(self._line(), done / max(1, sum(self._weights)))

    def _line(self) -> str:
        loaded = sum(phase in ("loaded", "connected") for phase in self._phases)
        return f"{loaded} of {len(self._phases)} stages loaded"
