"""How fast is one stage alone, by weight type, layout and rows; what do exact mode and Python cost?

    python -m benchmarks.engine                          # the 1.1B shape in Q4_0 and Q4_K_M, one pinned thread
    python -m benchmarks.engine --quants q8_0 f16 --layers 4 --rounds 5

For each quantization, the same shape runs with its weights mapped, packed as ggml packs them (`repacked`), laid out as
the policy chooses (in panels, where there are kernels for the processor), and so in exact mode. All of them take turns
within a round. Decoding is bound by memory: a step reads every weight once, whatever its rows. So its ceiling is rows *
bandwidth / bytes, with the bandwidth of one thread measured in the same run by a dot product over 256 MB. Prefill is
bound by arithmetic and has no such line. `python` is the part of a step's time that was not spent in ggml. `on CPU` is
the share of the time in which the thread had its CPU: well below 100 %, others were at work on the machine; `per CPU s`
then says what the thread would have done with the CPU to itself, though not with the memory to itself. Random-weight
files are made once and kept in the user's cache.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from benchmarks.report import print_json, print_table
from benchmarks.shapes import QUANTS, SHAPES, write_model
from eldric.engine.ggml.library import find_library
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange
from eldric.engine.stage import Stage, StageConfig
from eldric.engine.step import Run, StepInput

VARIANTS: dict[str, dict[str, Any]] = {
    "mapped": {"weights": "mapped"},
    "repacked": {"weights": "repacked"},
    "auto": {"weights": "auto"},
    "auto, exact": {"weights": "auto", "exact": True},
}
HISTORY = 64  # positions that each sequence holds when it decodes
STEPS = 3  # of each kind in a round


@dataclass(frozen=True, slots=True)
class Load:
    """A step to time: a row of each of so many sequences, or so many rows of one sequence."""

    kind: str  # decode or prefill
    rows: int

    def step(self, vocab_size: int, slot: int = 0) -> StepInput:
        ids = np.random.default_rng(self.rows).integers(3, vocab_size, self.rows).astype(np.int32)
        if self.kind == "prefill":
            return StepInput((Run(slot, 0, self.rows, True),), ids)
        return StepInput(tuple(Run(row, HISTORY, 1, True) for row in range(self.rows)), ids)


@dataclass(slots=True)
class Samples:
    """Seconds of each step: all in all, inside of ggml, and on the CPU."""

    step: list[float] = field(default_factory=list)
    ggml: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self, stage: Stage, step: StepInput) -> None:
        ggml_ns, cpu, began = stage.compute_ns, time.thread_time(), time.perf_counter()
        stage.compute(step)
        self.step.append(time.perf_counter() - began)
        self.cpu.append(time.thread_time() - cpu)
        self.ggml.append((stage.compute_ns - ggml_ns) / 1e9)

    def summary(self, rows: int) -> dict[str, float]:
        outside = [whole - inside for whole, inside in zip(self.step, self.ggml, strict=True)]
        return {
            "tokens_per_s": rows / statistics.median(self.step),
            "slowest_tokens_per_s": rows / max(self.step),
            "fastest_tokens_per_s": rows / min(self.step),
            "tokens_per_cpu_s": rows / statistics.median(self.cpu),
            "python_us": statistics.median(outside) * 1e6,
            "cpu_share": sum(self.cpu) / sum(self.step),
        }


def bandwidth_bytes_per_s() -> float:
    """What one thread reads per second at its best."""
    values = np.ones(64 << 20, np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.dot(values, values)
        seconds.append(time.perf_counter() - began)
    return values.nbytes / min(seconds)


def model_path(folder: Path, shape_name: str, quant: str, layers: int | None) -> Path:
    """The file of a shape, cut to so many layers, made if it is not there."""
    shape, name = SHAPES[shape_name], f"{shape_name}-{quant}.gguf"
    if layers is not None:
        shape, name = dataclasses.replace(shape, layers=layers), f"{shape_name}-{layers}-layers-{quant}.gguf"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write_model(partial, shape, quant)
        partial.replace(path)
    return path


def load_stages(path: Path, loads: Sequence[Load], threads: int, cpus: tuple[int, ...]) -> dict[str, Stage]:
    """The whole model, in every variant, with all sequences ready to decode."""
    slots = max([load.rows for load in loads if load.kind == "decode"], default=1)
    chunk = max([HISTORY, *(load.rows for load in loads if load.kind == "prefill")])
    stages = {}
    with ModelFile.open(path) as model:
        layers = LayerRange(0, model.metadata.get_int("llama.block_count"))
        for name, options in VARIANTS.items():
            config = StageConfig(layers, HISTORY + chunk, slots, chunk, slots, threads=threads, cpus=cpus, **options)
            stages[name] = Stage.load(model, config)
    for stage in stages.values():
        for slot in range(slots):
            stage.compute(Load("prefill", HISTORY).step(stage.spec.vocab_size, slot))
    return stages


def measure(stages: dict[str, Stage], loads: Sequence[Load], rounds: int) -> dict[tuple[str, Load], Samples]:
    found = {(variant, load): Samples() for variant in stages for load in loads}
    for _ in range(rounds):
        for load in loads:
            for variant, stage in stages.items():
                step = load.step(stage.spec.vocab_size)
                if load.kind == "prefill":
                    stage.truncate(0, 0)
                stage.compute(step)  # brings its graph and weights into the caches
                for _ in range(STEPS):
                    found[variant, load].take(stage, step)
                if load.kind == "prefill":
                    stage.compute(Load("prefill", HISTORY).step(stage.spec.vocab_size))
    return found


def benchmark(quant: str, path: Path, loads: Sequence[Load], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    before = bandwidth_bytes_per_s()
    stages = load_stages(path, loads, arguments.threads, arguments.cpus)
    weights = next(iter(stages.values())).shard.nbytes
    samples = measure(stages, loads, arguments.rounds)
    bandwidth = max(before, bandwidth_bytes_per_s())
    results = []
    for load in loads:
        for variant, stage in stages.items():
            result: dict[str, Any] = {"quant": quant, "variant": variant, "kind": load.kind, "rows": load.rows}
            result |= samples[variant, load].summary(load.rows)
            decoding = load.kind == "decode" and arguments.threads == 1
            result["ceiling_tokens_per_s"] = load.rows * bandwidth / weights if decoding else None
            result["private_bytes"] = stage.memory.repacked
            results.append(result)
    for stage in stages.values():
        stage.close()
    title = f"{path.stem}: {weights / 1e6:.0f} MB, {arguments.threads} thread, {bandwidth / 1e9:.1f} GB/s per thread"
    print_table(title, COLUMNS, [row(result) for result in results])
    return results


COLUMNS = ("step", "rows", "weights", "tokens/s", "slowest", "fastest", "per CPU s", "ceiling", "python us", "on CPU")


def row(result: dict[str, Any]) -> list[object]:
    ceiling = result["ceiling_tokens_per_s"]
    cells = [result[name] for name in ("kind", "rows", "variant", "tokens_per_s")]
    cells += [result[f"{name}_tokens_per_s"] for name in ("slowest", "fastest")] + [result["tokens_per_cpu_s"]]
    cells += ["" if ceiling is None else ceiling, result["python_us"], f"{result['cpu_share']:.0%}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one stage that holds a whole model.")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=["q4_0", "q4_k_m"])
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 2, 4, 8, 16], help="rows of decode steps")
    parser.add_argument("--prefill", nargs="*", type=int, default=[128], help="tokens of a prompt's chunk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", nargs="+", type=int, help="default: the last ones that this process may use")
    parser.add_argument("--folder", type=Path, default=platformdirs.user_cache_path("eldric") / "shapes")
    arguments = parser.parse_args()
    arguments.cpus = tuple(arguments.cpus or sorted(os.sched_getaffinity(0))[-arguments.threads :])
    os.sched_setaffinity(0, arguments.cpus)
    loads = [Load("decode", rows) for rows in arguments.decode] + [Load("prefill", rows) for rows in arguments.prefill]
    results = []
    for quant in arguments.quants:
        path = model_path(arguments.folder, arguments.shape, quant, arguments.layers)
        results += benchmark(quant, path, loads, arguments)
    library = find_library()
    config = {name: value for name, value in vars(arguments).items() if name != "folder"}
    print_json("engine", config | {"ggml": library.version, "cpu_variant": library.cpu_variant}, results)


if __name__ == "__main__":
    main()
