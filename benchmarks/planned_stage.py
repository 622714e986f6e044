"""Loads one stage as a plan says, in a process of its own, and tells what it really took.

    python -m benchmarks.planned_stage MODEL START STOP [CONTEXT SLOTS CHUNK]

Prints an object: shard_bytes (of its tensors), mapped_bytes and resident_bytes (of the file, by the kernel), memory
(what the engine says), private_bytes (what the process took beside the file), load_s, step_s (one token).
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange
from eldric.engine.stage import Stage, StageConfig
from eldric.engine.step import Run, StepInput
from tests.stage_memory import file_bytes, private_bytes


def measure(path: Path, start: int, stop: int, context: int = 4096, slots: int = 4, chunk: int = 64) -> dict[str, Any]:
    """What such a process prints. Raises CalledProcessError."""
    arguments = map(str, (path, start, stop, context, slots, chunk))
    command = [sys.executable, "-m", "benchmarks.planned_stage", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main() -> None:
    path = Path(sys.argv[1])
    start, stop, context, slots, chunk = map(int, [*sys.argv[2:4], *(sys.argv[4:7] or (4096, 4, 64))])
    before, began = private_bytes(), time.perf_counter()
    with ModelFile.open(path) as model:
        lane = max(1, slots // 2)
        stage = Stage.load(
            model, StageConfig(LayerRange(start, stop), context, slots, chunk, lane, weights="mapped", exact=True)
        )
    load_s = time.perf_counter() - began
    with stage:
        hidden = np.zeros((chunk, stage.spec.hidden_size), np.float32)
        for first, count in ((0, chunk), (chunk, 1)):
            began = time.perf_counter()
            runs = (Run(0, first, count, True),)
            tokens = np.full(count, 65, np.int32)
            step = StepInput(runs, tokens) if stage.shard.is_head else StepInput(runs, hidden=hidden[:count])
            output = stage.compute(step)
        step_s = time.perf_counter() - began
        values = output.logits if stage.shard.is_tail else output.hidden
        assert values is not None and np.isfinite(values).all()
        resident, mapped = file_bytes(path)
        document = {
            "shard_bytes": stage.shard.nbytes,
            "mapped_bytes": mapped,
            "resident_bytes": resident,
            "memory": dataclasses.asdict(stage.memory),
            "private_bytes": private_bytes() - before,
            "load_s": round(load_s, 3),
            "step_s": round(step_s, 3),
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
