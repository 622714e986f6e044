"""How many decode steps are in the ring at a time, found by trying. Pure: it is told when tokens came back.

More steps keep more stages busy. Fewer carry more sequences each, so that all weights are read less often for the same
tokens: that wins where reading them is what takes the time, above all where stages share one memory. Which of the two
it is depends on machines, links, model and number of sequences, so it is measured: for each number of sequences, some
rounds (a token for each of them) are timed with every number of steps worth trying, now and again.
"""

import statistics
from dataclasses import dataclass, field

#: Rounds after a change that say nothing yet, and those by which a number of steps is judged.
SETTLING_ROUNDS, TRIAL_ROUNDS = 2, 8
#: Rounds until all are tried again; twice as many, up to the most, whenever that changed nothing.
PATIENCE_ROUNDS, MOST_PATIENCE_ROUNDS = 500, 16_000
#: Another number of steps must take less than this share of the time to be worth a change.
WORTHWHILE = 0.97


@dataclass(slots=True)
class _Choice:
    """For one number of sequences. best: the candidate of the last verdict. current: the one in use, or on trial."""

    candidates: tuple[int, ...]
    best: int
    current: int = field(init=False)
    times_ns: dict[int, list[float]] = field(init=False)  # of rounds, by candidate, of the trial that runs
    rounds: int = 0  # since the last verdict
    patience: int = 0

    def __post_init__(self) -> None:
        self._try_all()

    def _try_all(self) -> None:
        self.times_ns = {candidate: [] for candidate in self.candidates}
        self.current = self.best

    def note(self, round_ns: float) -> None:
        """A round with `current` took so long."""
        self.rounds += 1
        if self.rounds < self.patience or len(self.candidates) == 1:
            return
        if self.rounds == self.patience:
            self._try_all()
            return
        self.times_ns[self.current].append(round_ns)
        left = [candidate for candidate, times in self.times_ns.items() if len(times) < TRIAL_ROUNDS]
        if not left:
            self._judge()
        elif len(self.times_ns[self.current]) >= TRIAL_ROUNDS:
            self.current = left[0]

    def _judge(self) -> None:
        medians = {candidate: statistics.median(times) for candidate, times in self.times_ns.items()}
        fastest = min(medians, key=lambda candidate: medians[candidate])
        if medians[fastest] < WORTHWHILE * medians[self.best]:
            self.best, self.patience = fastest, PATIENCE_ROUNDS
        else:
            self.patience = min(max(2 * self.patience, PATIENCE_ROUNDS), MOST_PATIENCE_ROUNDS)
        self.current, self.rounds = self.best, 0


class Lanes:
    """Of one head. Not thread-safe."""

    def __init__(self, most: int, rows: int) -> None:
        """most: steps in flight at most. rows: sequences of a step at most."""
        self._most, self._rows = most, rows
        self._choices: dict[int, _Choice] = {}
        self._timed = (0, 0)  # sequences and steps of the round that runs
        self._settling = 0
        self._began_ns = self._tokens = 0

    def count(self, sequences: int) -> int:
        """Decode steps that should be in flight for so many sequences."""
        choice = self._choices.get(sequences)
        return choice.current if choice is not None else self._choice(sequences).current

    def returned(self, sequences: int, tokens: int, now_ns: int) -> None:
        """A decode step came back with so many tokens, and nothing but decode steps of so many sequences is in the
        ring."""
        choice = self._choice(sequences)
        if self._timed != (sequences, choice.current):
            self._timed, self._settling = (sequences, choice.current), SETTLING_ROUNDS
            self._begin(now_ns)
            return
        self._tokens += tokens
        if self._tokens < sequences:
            return
        if self._settling:
            self._settling -= 1
        else:
            choice.note((now_ns - self._began_ns) * sequences / self._tokens)
        self._begin(now_ns)

    def disturbed(self) -> None:
        """Something else is in the ring, or nothing: the round that runs says nothing."""
        self._timed = (0, 0)

    def _begin(self, now_ns: int) -> None:
        self._began_ns, self._tokens = now_ns, 0

    def _choice(self, sequences: int) -> _Choice:
        choice = self._choices.get(sequences)
        if choice is None:
            candidates = self._candidates(sequences)
            choice = self._choices[sequences] = _Choice(candidates, self._guess(sequences, candidates))
        return choice

    def _guess(self, sequences: int, candidates: tuple[int, ...]) -> int:
        """What is best for the nearest number of sequences that is known, or else the most."""
        known = [count for count, choice in self._choices.items() if choice.patience]
        if not known:
            return candidates[0]
        nearest = self._choices[min(known, key=lambda count: abs(count - sequences))]
        return nearest.best if nearest.best in candidates[1:] else candidates[0]

    def _candidates(self, sequences: int) -> tuple[int, ...]:
        """From the most steps to the fewest: halves, as long as a step can carry its share."""
        counts = [max(1, min(self._most, sequences))]
        while counts[-1] > 1 and -(-sequences // (counts[-1] // 2)) <= self._rows:
            counts.append(counts[-1] // 2)
        return tuple(counts)
