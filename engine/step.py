"""One micro-batch as the engine sees it: runs of consecutive tokens, and what comes out."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Hidden = NDArray[np.float32]


class Run(NamedTuple):
    """Consecutive tokens of one sequence inside a step."""

    slot: int  # index of the sequence's KV slot, the same in every stage
    position: int  # absolute position of the run's first token
    count: int  # type: ignore[assignment]  # number of tokens, at least 1 (tuple.count is hidden on purpose)
    logits: bool  # whether the tail computes logits for the run's LAST token


@dataclass(slots=True)
class StepInput:
    """What enters a stage. Exactly one of `tokens` and `hidden` is given; rows lie in the order of `runs`.

    tokens: [rows] int32, for the head. hidden: [rows, hidden_size] float32, for every other stage.
    """

    runs: tuple[Run, ...]
    tokens: Tokens | None = None
    hidden: Hidden | None = None

    @property
    def rows(self) -> int:
        return sum(run.count for run in self.runs)
