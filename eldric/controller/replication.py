"""How many data workers should hold a model, and which copies that takes: a state machine without clock or socket.

A model that too few data workers hold is copied when that has lasted for a grace time, or at once when an operator has
just said how many there should be. So a data worker that restarts costs nothing, and one that comes back later leaves a
copy too many, which nobody removes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from eldric.errors import EldricError, NotEnoughSpace, NotReady, Unavailable
from eldric.v1 import stage_pb2

#: Pause before a data worker whose copy failed gets another try, in seconds: the first, and the longest.
RETRY_S, MOST_RETRY_S = 15.0, 600.0


class Holding(StrEnum):
    """What a data worker has under the name of a model."""

    SAME = "same"  # these very files
    OTHER = "other"  # other files, or damaged ones


@dataclass(frozen=True, slots=True)
class Goal:
    """So many data workers should hold these files."""

    model: str
    copies: int
    source: stage_pb2.ModelSource

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.source.files)


@dataclass(frozen=True, slots=True)
class StoreView:
    """A data worker that answers. takes_copies: it is up, and does not drain. held: by model, where it has anything."""

    name: str
    free_bytes: int
    takes_copies: bool = True
    held: Mapping[str, Holding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Copy:
    """Have `target` copy a model from `source`: names of data workers."""

    model: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class CopyProgress:
    phase: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """waits_s: a copy is made in so many seconds if nobody comes back; 0: nothing is waited for."""

    goal: Goal
    holders: tuple[str, ...]
    copying: Mapping[Copy, CopyProgress]
    problem: EldricError | None
    waits_s: float


@dataclass(slots=True)
class _Failures:
    """Of copies to one data worker, or from one, in a row. kept_bytes: what came and waits there for the next try."""

    count: int = 0
    not_before: float = 0.0
    kept_bytes: int = 0
    error: EldricError | None = None


@dataclass(slots=True)
class _Kept:
    goal: Goal
    urgent: bool = True
    short_since: float | None = None
    holders: tuple[str, ...] = ()
    problem: EldricError | None = None
    targets: dict[str, _Failures] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)


class Replication:
    """The goals of a cluster, and the copies that are being made for them."""

    def __init__(self, grace_s: float, at_once: int) -> None:
        """at_once: copies that are made at the same time, of all models; one at a time for each data worker."""
        self._grace_s, self._at_once = grace_s, at_once
        self._kept: dict[str, _Kept] = {}
        self._running: dict[Copy, CopyProgress] = {}

    @property
    def goals(self) -> list[Goal]:
        return [self._kept[model].goal for model in sorted(self._kept)]

    def set(self, goal: Goal, *, urgent: bool) -> None:
        """Takes the place of an earlier goal. urgent: what is missing now waits for no grace time."""
        self._kept[goal.model] = _Kept(goal, urgent)

    def drop(self, model: str) -> list[Copy]:
        """Forgets a goal. Returns the copies that are being made for it."""
        self._kept.pop(model, None)
        return [copy for copy in self._running if copy.model == model]

    def survey(self, stores: Sequence[StoreView], now: float) -> list[Copy]:
        """What to copy, by what the data workers that answer hold. What is returned counts as begun."""
        for kept in self._kept.values():
            self._look(kept, stores, now)
        begun = []
        for kept in sorted(self._kept.values(), key=lambda kept: (len(kept.holders), kept.goal.model)):
            begun += self._mend(kept, stores, now)
        return begun

    def progress(self, copy: Copy, progress: CopyProgress) -> None:
        if copy in self._running:
            self._running[copy] = progress

    def ended(self, copy: Copy, now: float, error: EldricError | None = None) -> None:
        """A copy is there, or failed."""
        progress = self._running.pop(copy, CopyProgress())
        kept = self._kept.get(copy.model)
        if kept is None:
            return
        if error is None:
            kept.targets.pop(copy.target, None)
            kept.sources.pop(copy.source, None)
            kept.holders = tuple(sorted({*kept.holders, copy.target}))
            return
        failures = kept.targets.setdefault(copy.target, _Failures())
        failures.not_before = now + min(MOST_RETRY_S, RETRY_S * 2**failures.count)
        failures.count = min(failures.count + 1, 16)
        failures.kept_bytes = max(failures.kept_bytes, progress.done_bytes)
        failures.error = error
        kept.sources[copy.source] = kept.sources.get(copy.source, 0) + 1

    def status(self, model: str, now: float) -> Status | None:
        """None for a model without a goal."""
        kept = self._kept.get(model)
        if kept is None:
            return None
        copying = {copy: progress for copy, progress in self._running.items() if copy.model == model}
        waits_s = 0.0
        if kept.short_since is not None and not kept.urgent and self._missing(kept) > 0:
            waits_s = max(0.0, kept.short_since + self._grace_s - now)
        return Status(kept.goal, kept.holders, copying, None if copying else kept.problem, waits_s)

    def _look(self, kept: _Kept, stores: Sequence[StoreView], now: float) -> None:
        model = kept.goal.model
        kept.holders = tuple(sorted(store.name for store in stores if store.held.get(model) is Holding.SAME))
        kept.problem = None
        if len(kept.holders) >= kept.goal.copies:
            kept.short_since, kept.urgent = None, False
        elif kept.short_since is None:
            kept.short_since = now

    def _missing(self, kept: _Kept) -> int:
        """Copies that nobody holds or makes."""
        made = {copy.target for copy in self._running if copy.model == kept.goal.model}
        return kept.goal.copies - len({*kept.holders, *made})

    def _mend(self, kept: _Kept, stores: Sequence[StoreView], now: float) -> list[Copy]:
        begun: list[Copy] = []
        while self._missing(kept) > 0:
            if not kept.holders:
                kept.problem = Unavailable(f"no data worker that answers holds {kept.goal.model}")
                break
            if kept.short_since is None or not (kept.urgent or now - kept.short_since >= self._grace_s):
                break
            if len(self._running) >= self._at_once:
                break
            target = self._target(kept, stores, now)
            if target is None:
                break
            copy = Copy(kept.goal.model, self._source(kept), target)
            self._running[copy] = CopyProgress()
            begun.append(copy)
        return begun

    def _source(self, kept: _Kept) -> str:
        """Who has failed least often, and sends the fewest copies now."""
        sending = [copy.source for copy in self._running]
        return min(kept.holders, key=lambda name: (kept.sources.get(name, 0), sending.count(name), name))

    def _target(self, kept: _Kept, stores: Sequence[StoreView], now: float) -> str | None:
        """Who has most of it already, then who has most room; None, with the problem noted, where nobody can."""
        model, size = kept.goal.model, kept.goal.size_bytes
        none = _Failures()
        free = [store for store in stores if store.takes_copies and model not in store.held]
        if not free:
            others = [store.name for store in stores if store.held.get(model) is Holding.OTHER]
            named = f"; {', '.join(others)} has another or a damaged model of that name" if others else ""
            kept.problem = NotReady(f"{model} should be on one more data worker, and there is none that is up{named}")
            return None
        roomy = [each for each in free if each.free_bytes >= size - kept.targets.get(each.name, none).kept_bytes]
        if not roomy:
            best = max(free, key=lambda store: store.free_bytes)
            kept.problem = NotEnoughSpace(
                f"a copy of {model} needs {size} bytes, and no other data worker has so much room: "
                f"the most has {best.name}, {best.free_bytes} bytes"
            )
            return None
        rested = [each for each in roomy if kept.targets.get(each.name, none).not_before <= now]
        if not rested:
            latest = max((kept.targets[each.name] for each in roomy), key=lambda failures: failures.not_before)
            kept.problem = latest.error
            return None
        busy = {copy.target for copy in self._running}
        idle = [each for each in rested if each.name not in busy]
        if not idle:
            return None  # its turn comes
        chosen = min(idle, key=lambda e: (-kept.targets.get(e.name, none).kept_bytes, -e.free_bytes, e.name))
        return chosen.name
