"""Measures what a stage's pages and buffers take, in a process of its own.

    python -m tests.stage_memory MODEL START STOP WEIGHTS [STEPS]

Prints an object: file_rss and file_mapped (bytes of the model file that are resident, and mapped), shard (bytes of its
tensors), memory (what the stage says), and the process's private resident bytes before loading, with the stage at
work, after STEPS steps, and closed.
"""

import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange
from eldric.engine.stage import Stage, StageConfig
from eldric.engine.step import Run, StepInput

SLOTS, CONTEXT, CHUNK = 4, 256, 32


def file_bytes(path: Path) -> tuple[int, int]:
    """Resident and mapped bytes of all mappings of a file, from /proc/self/smaps."""
    resident = mapped = 0
    of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            of_file = line.endswith(str(path))
        elif of_file and name == "Rss:":
            resident += int(rest[0]) * 1024
        elif of_file and name == "Size:":
            mapped += int(rest[0]) * 1024
    return resident, mapped


def private_bytes() -> int:
    gc.collect()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Anonymous in smaps_rollup")


def steps(stage: Stage, count: int) -> None:
    """Decode steps of 1 to 4 rows and chunks of 2 to 32, at changing positions and slots."""
    rng = np.random.default_rng(0)
    for index in range(count):
        if index % 3:
            runs = tuple(Run(slot, 0, 1, True) for slot in range(1 + index % SLOTS))
        else:
            runs = (Run(index % SLOTS, 0, 2 + index % (CHUNK - 1), bool(index % 2)),)
        rows = sum(run.count for run in runs)
        hidden = rng.standard_normal((rows, stage.spec.hidden_size)).astype(np.float32)
        ids = rng.integers(0, stage.spec.vocab_size, rows).astype(np.int32)
        stage.compute(StepInput(runs, ids) if stage.shard.is_head else StepInput(runs, hidden=hidden))


def loaded(path: Path, layers: LayerRange, weights: str) -> Stage:
    with ModelFile.open(path) as model:
        config = StageConfig(layers, CONTEXT, SLOTS, CHUNK, SLOTS, weights=weights)  # type: ignore[arg-type]
        return Stage.load(model, config)


def measures(path: Path, layers: LayerRange, weights: str, count: int) -> Iterator[tuple[str, object]]:
    warm = loaded(path, layers, weights)  # what the process takes once and for all
    steps(warm, 8)
    warm.close()
    yield "before", private_bytes()
    stage = loaded(path, layers, weights)
    steps(stage, 200)
    resident, mapped = file_bytes(path)
    yield "file_rss", resident
    yield "file_mapped", mapped
    yield "shard", stage.shard.nbytes
    yield "memory", dataclasses.asdict(stage.memory)
    yield "at_work", private_bytes()
    objects = len(gc.get_objects())
    steps(stage, count)
    yield "after_steps", private_bytes()
    yield "new_objects", len(gc.get_objects()) - objects
    stage.close()
    yield "closed", private_bytes()
    yield "file_mapped_closed", file_bytes(path)[1]


if __name__ == "__main__":
    _, model_path, start, stop, mode, step_count = sys.argv
    print(json.dumps(dict(measures(Path(model_path), LayerRange(int(start), int(stop)), mode, int(step_count)))))
