"""Stages in this process, chained by hand: what one stage gives is what the next one takes."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange
from eldric.engine.spec import spec_of
from eldric.engine.stage import Logits, Stage, StageConfig
from eldric.engine.step import Run, StepInput


class Chain:
    """A model cut into stages. Greedy, and deterministic."""

    def __init__(self, path: Path, cuts: Sequence[int] = (), **options: Any) -> None:
        """cuts: layers at which a new stage begins. options: those of StageConfig, with small defaults."""
        sizes: dict[str, Any] = {"context": 640, "slots": 4, "chunk": 32, "lane_slots": 4} | options
        with ModelFile.open(path) as model:
            self.spec = spec_of(model)
            bounds = [0, *cuts, self.spec.layers]
            ranges = [LayerRange(start, stop) for start, stop in itertools.pairwise(bounds)]
            self.stages = [Stage.load(model, StageConfig(layers=layers, **sizes)) for layers in ranges]
        self.chunk = sizes["chunk"]

    def step(self, runs: Sequence[Run], tokens: Sequence[int]) -> Logits | None:
        """One step through all stages. The logits are a copy."""
        step = StepInput(tuple(runs), tokens=np.array(tokens, np.int32))
        for stage in self.stages:
            output = stage.compute(step)
            step = StepInput(tuple(runs), hidden=output.hidden)
        return None if output.logits is None else output.logits.copy()

    def prefill(self, slot: int, tokens: Sequence[int], start: int = 0) -> Logits:
        """Run a prompt in chunks that end at multiples of the chunk size. Returns the last token's logits."""
        position, logits = start, None
        while position < start + len(tokens):
            stop = min((position // self.chunk + 1) * self.chunk, start + len(tokens))
            run = Run(slot, position, stop - position, stop == start + len(tokens))
            logits = self.step([run], tokens[position - start : stop - start])
            position = stop
        assert logits is not None
        return logits

    def greedy(self, prompt: Sequence[int], count: int, slot: int = 0) -> tuple[list[int], Logits]:
        """The tokens that follow, and the logits that each was chosen by, [count, vocab]."""
        rows = [self.prefill(slot, prompt)[0]]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < count:
            rows.append(self.decode({slot: (len(prompt) + len(tokens) - 1, tokens[-1])})[slot])
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.stack(rows)

    def forced(self, prompt: Sequence[int], tokens: Sequence[int], slot: int = 0) -> Logits:
        """The logits by which each of the tokens would be chosen after the prompt and those before it."""
        rows = [self.prefill(slot, prompt)[0]]
        for index, token in enumerate(tokens[:-1]):
            rows.append(self.decode({slot: (len(prompt) + index, token)})[slot])
        return np.stack(rows)

    def decode(self, rows: dict[int, tuple[int, int]]) -> dict[int, NDArray[np.float32]]:
        """One token of each slot: (position, token) by slot. Returns logits by slot."""
        runs = [Run(slot, position, 1, True) for slot, (position, _) in rows.items()]
        logits = self.step(runs, [token for _, token in rows.values()])
        assert logits is not None
        return dict(zip(rows, logits, strict=True))

    def close(self) -> None:
        for stage in self.stages:
            stage.close()

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def random_prompt(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocab_size, length)]
