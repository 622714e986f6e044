"""Sampling at the last stage: one sampler for each sequence that holds a slot."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eldric.engine.sampling import Sampler
from eldric.engine.step import Run
from eldric.v1 import frame_pb2
from eldric.worker.convert import sampling_params


class Tail:
    """The samplers of a pipeline's sequences, by slot. Owned by the tail's compute thread."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._samplers: dict[int, Sampler] = {}

    def open(self, message: frame_pb2.SequenceOpen) -> None:
        """A sequence takes a slot. Raises InvalidSampling."""
        params = sampling_params(message.sampling)
        self._samplers[message.slot] = Sampler(params, self._vocab_size, list(message.prompt))

    def close(self, slot: int) -> None:
        self._samplers.pop(slot, None)

    def sample(
        self, runs: Sequence[Run], logits: NDArray[np.float32] | None, likeliest: Sequence[int] | None = None
    ) -> frame_pb2.StepTokens:
        """One token for each run with logits. logits: [runs with logits, vocab_size] float32, None for no such run.
        likeliest: as in StepOutput. Raises EngineError if logits are not numbers."""
        answer = frame_pb2.StepTokens()
        if logits is None:
            return answer
        row = 0
        for run in runs:
            if not run.logits:
                continue
            sampler = self._samplers.get(run.slot)
            if likeliest is not None and sampler is not None and sampler.takes_likeliest and likeliest[row] >= 0:
                answer.tokens.add(slot=run.slot, token=likeliest[row])
            elif sampler is not None:
                sampled = sampler.sample(logits[row], run.position + run.count)
                entry = answer.tokens.add(slot=run.slot, token=sampled.token)
                if sampled.logprob is not None:
                    entry.logprob = sampled.logprob
                    entry.top_tokens.extend(token for token, _ in sampled.top)
                    entry.top_logprobs.extend(logprob for _, logprob in sampled.top)
            row += 1
        return answer
