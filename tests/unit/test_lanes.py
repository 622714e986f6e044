"""The number of decode steps in flight, against a ring of stages that compute in a time of the test's own."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from eldric.engine.lanes import MOST_PATIENCE_ROUNDS, PATIENCE_ROUNDS, SETTLING_ROUNDS, TRIAL_ROUNDS, Lanes
from eldric.engine.schedule import ScheduleConfig, Scheduler, Sequence, Step

#: Nanoseconds of a step in one stage, from its rows and the number of stages that compute at once, this one counted.
Cost = Callable[[int, int], int]


def reading_weights(rows: int, busy: int) -> int:
    """Stages share a memory, and reading the weights is all that takes time."""
    return 1000 * busy + rows


def own_memory(rows: int, busy: int) -> int:
    """The same with a memory for each stage: here it is all one, but for a row's own cost."""
    return 1000 + 100 * rows


def computing(rows: int, busy: int) -> int:
    return 1000 * rows


@dataclass
class Ring:
    """Stages that take a step after the other, first come first served."""

    scheduler: Scheduler
    cost: Cost
    stages: int
    now_ns: int = 0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._queues: list[deque[Step]] = [deque() for _ in range(self.stages)]
        self._busy: dict[int, Step] = {}
        self._ends: list[tuple[int, int, int]] = []  # when, a running number, stage
        self._number = itertools.count()

    def run(self, decode_steps: int) -> None:
        stop = len(self.steps) + decode_steps
        while len(self.steps) < stop:
            self._feed()
            self.now_ns, _, stage = heapq.heappop(self._ends)
            step = self._busy.pop(stage)
            if stage + 1 < self.stages:
                self._queues[stage + 1].append(step)
                self._begin(stage + 1)
            else:
                tokens = [(run.slot, 7) for run in step.runs if run.logits]
                self.scheduler.step_done(step.number, tokens, self.now_ns)
            self._begin(stage)

    def _feed(self) -> None:
        while not self._busy.get(0) and (action := self.scheduler.next_action()) is not None:
            if isinstance(action, Step):
                self._queues[0].append(action)
                self._begin(0)
                if not action.is_chunk:
                    self.steps.append(action)

    def _begin(self, stage: int) -> None:
        if stage not in self._busy and self._queues[stage]:
            self._busy[stage] = step = self._queues[stage].popleft()
            ends_ns = self.now_ns + self.cost(len(step.tokens), len(self._busy))
            heapq.heappush(self._ends, (ends_ns, next(self._number), stage))


def ring(cost: Cost, sequences: int, stages: int = 2, decode_rows: int = 16) -> Ring:
    config = ScheduleConfig(slots=sequences, context=1 << 20, chunk=8, lanes=stages, decode_rows=decode_rows, queue=0)
    made = Ring(Scheduler(config), cost, stages)
    for number in range(sequences):
        made.scheduler.submit(Sequence(str(number), np.arange(3, dtype=np.int32), 0))
    return made


def rows_of(steps: list[Step]) -> set[int]:
    return {len(step.runs) for step in steps}


@pytest.mark.parametrize("sequences", [2, 3, 8])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_where_reading_weights_takes_the_time_all_sequences_go_in_one_step(sequences: int, stages: int) -> None:
    made = ring(reading_weights, sequences, stages)
    made.run(200)
    assert rows_of(made.steps[-20:]) == {sequences}


@pytest.mark.parametrize("cost", [own_memory, computing])
@pytest.mark.parametrize(("sequences", "stages"), [(2, 2), (8, 2), (6, 3), (12, 6)])
def test_where_stages_gain_from_each_other_every_one_has_a_step(cost: Cost, sequences: int, stages: int) -> None:
    made = ring(cost, sequences, stages)
    made.run(400)
    assert rows_of(made.steps[-20:]) == {sequences // stages}


def test_a_single_sequence_has_nothing_to_try() -> None:
    made = ring(computing, 1)
    made.run(50)
    assert rows_of(made.steps) == {1}


def test_a_step_never_carries_more_than_it_may() -> None:
    made = ring(reading_weights, 8, decode_rows=4)
    made.run(300)
    assert max(rows_of(made.steps)) == 4


def test_sequences_that_come_and_go_get_what_was_found_for_as_many() -> None:
    lanes = Lanes(2, 16)
    for number in range(200):
        lanes.returned(4, 4 // lanes.count(4), 100 * lanes.count(4) * number)
        lanes.disturbed() if number % 40 == 39 else None
    assert lanes.count(4) == 1
    assert lanes.count(5) == 1  # the nearest that is known


def test_rounds_with_prompts_in_between_say_nothing() -> None:
    lanes = Lanes(2, 16)
    for number in range(1000):
        lanes.returned(2, 1, 100 * number)
        if number % 3 == 2:
            lanes.disturbed()
    assert lanes.count(2) == 2 and not lanes._choice(2).patience


def test_what_was_found_is_tried_again_and_changes_when_the_machine_does() -> None:
    made = ring(reading_weights, 2)
    made.run(200)
    assert rows_of(made.steps[-10:]) == {2}
    made.cost = own_memory
    made.run(2 * PATIENCE_ROUNDS)
    assert rows_of(made.steps[-10:]) == {1}


def test_trying_again_costs_little_where_nothing_changes() -> None:
    made = ring(reading_weights, 2)
    made.run(10_000)
    tried = sum(len(step.runs) == 1 for step in made.steps[1000:])
    assert 0 < tried < 0.02 * 9000
    assert made.scheduler._lanes._choice(2).patience <= MOST_PATIENCE_ROUNDS


def test_a_slow_round_among_others_does_not_decide() -> None:
    lanes, now = Lanes(2, 16), 0
    for number in range(2 * (SETTLING_ROUNDS + TRIAL_ROUNDS) + 4):
        for _ in range(lanes.count(2)):
            now += 150 // lanes.count(2) if lanes.count(2) == 1 else 50
            now += 5000 if number == SETTLING_ROUNDS + 2 else 0
            lanes.returned(2, 2 // lanes.count(2), now)
    assert lanes.count(2) == 2
