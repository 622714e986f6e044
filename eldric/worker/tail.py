"""What the last stage makes of its output: for each sequence that holds a slot, sampled tokens or an embedding."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import EngineError
from eldric.engine.sampling import Sampler
from eldric.engine.stage import StepOutput
from eldric.engine.step import Run
from eldric.v1 import frame_pb2
from eldric.worker.convert import sampling_params


class Tail:
    """The samplers of a pipeline's sequences, by slot. Owned by the tail's compute thread."""

    def __init__(self, stage: int, vocab_size: int) -> None:
        """stage: the tail's index."""
        self._stage, self._vocab_size = stage, vocab_size
        self._samplers: dict[int, Sampler] = {}
        self._embedded: set[int] = set()  # slots of sequences that are embedded

    def open(self, message: frame_pb2.SequenceOpen) -> None:
        """A sequence takes a slot. Raises InvalidSampling."""
        self.close(message.slot)
        if message.embed:
            self._embedded.add(message.slot)
            return
        params = sampling_params(message.sampling)
        self._samplers[message.slot] = Sampler(params, self._vocab_size, list(message.prompt))

    def close(self, slot: int) -> None:
        self._samplers.pop(slot, None)
        self._embedded.discard(slot)

    def answer(
        self, runs: Sequence[Run], output: StepOutput, final: Callable[[], NDArray[np.float32]]
    ) -> frame_pb2.StepTokens:
        """One token, or the embedding, for each run with logits; an error for those whose values are no numbers.

        output: of the step. final: gives the hidden state that the only row of logits was made of, [hidden_size].
        """
        answer = frame_pb2.StepTokens()
        logits, likeliest = output.logits, output.likeliest
        if logits is None:
            return answer
        row = 0
        for run in runs:
            if not run.logits:
                continue
            sampler = self._samplers.get(run.slot)
            try:
                if likeliest is not None and sampler is not None and sampler.takes_likeliest and likeliest[row] >= 0:
                    answer.tokens.add(slot=run.slot, token=likeliest[row])
                elif sampler is not None:
                    sampled = sampler.sample(logits[row], run.position + run.count)
                    entry = answer.tokens.add(slot=run.slot, token=sampled.token)
                    if sampled.logprob is not None:
                        entry.logprob = sampled.logprob
                        entry.top_tokens.extend(token for token, _ in sampled.top)
                        entry.top_logprobs.extend(logprob for _, logprob in sampled.top)
                elif run.slot in self._embedded:
                    answer.tokens.add(slot=run.slot, embedding=_numbers(final()))
            except EngineError as error:
                self._add_failure(answer, run.slot, error)
            row += 1
        return answer

    def _add_failure(self, answer: frame_pb2.StepTokens, slot: int, error: EngineError) -> None:
        """The model went astray in one sequence; those beside it have nothing to do with it."""
        answer.error.stage, answer.error.status, answer.error.message = self._stage, error.status, str(error)
        answer.error.slots.append(slot)


def _numbers(embedding: NDArray[np.float32]) -> list[float]:
    if not np.isfinite(embedding).all():
        raise EngineError("the model's output is no number: the embedding holds infinite or undefined values")
    values: list[float] = embedding.tolist()
    return values
