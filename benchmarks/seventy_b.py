"""Is a plan for a 70B model over workers of 24, 16 and 24 GB right, and does each planned stage load and run?

    python -m benchmarks.seventy_b               plan, then load each planned stage in turn (some minutes)
    python -m benchmarks.seventy_b --plan-only   seconds

The model is a sparse file of 42 GB: a real header with a vocabulary of 128k tokens, and a hole for weights. Its zeros
take no disk, but memory while a stage has them mapped: the largest stage needs 19 GB free. The folder must be on a
disk, not on a tmpfs. Aims: a second from the header to the plan; memory right to 2 %. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.planned_stage import measure
from benchmarks.report import print_json, print_table
from benchmarks.shapes import SHAPES, write_model
from eldric.cli.local import LocalCluster
from eldric.cli.roster import Shape
from eldric.client import Client, Plan, PlannedStage

MODEL = "llama-70b"
#: As the files of the repository are called that the short name stands for.
FILE = "Llama-3.3-70B-Instruct-Q4_K_M.gguf"
MEMORY = ("24GB", "16GB", "24GB")
CONTEXT, SLOTS, CHUNK = 4096, 4, 64
ROUNDS = 5


def make_cluster(folder: Path) -> LocalCluster:
    """A cluster that is not started, with a worker for each of MEMORY and the sparse model in its store."""
    local = LocalCluster.create(folder, Shape(workers=len(MEMORY), threads=1))
    memory = iter(MEMORY)
    local.nodes = [
        entry.with_options({"--memory": next(memory)}) if entry.kind == "worker" else entry for entry in local.nodes
    ]
    local.save()
    write_model(folder / "models" / FILE, SHAPES["70b"], "q4_k_m", name="Llama 3.3 70B Instruct", sparse=True)
    return local


def dry_run(folder: Path) -> tuple[dict[str, Any], float]:
    """`eldric-cli deploy llama-70b --dry-run`: what it prints, and the seconds that it took."""
    command = [sys.executable, "-m", "eldric.cli.main", "deploy", MODEL, "--dry-run", "--weights", "mapped", "--json"]
    command += ["--ctx", str(CONTEXT), "--slots", str(SLOTS), "--chunk", str(CHUNK), "--dir", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document, time.perf_counter() - began


def error(real: float, planned: float) -> str:
    return f"{(real / planned - 1) * 100:+.2f} %"


def forget(path: Path) -> None:
    """Give back the file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path, stage: PlannedStage) -> dict[str, Any]:
    """Load and run a stage, and compare it with its plan."""
    print(f"loading stage {stage.index}, layers {stage.layers}", file=sys.stderr, flush=True)
    found = measure(path, *stage.layers, CONTEXT, SLOTS, CHUNK)
    forget(path)
    memory = found["memory"]
    parts = {"weights": memory["mapped"] + memory["repacked"], "kv": memory["kv"], "compute": memory["compute"]}
    planned = {"weights": stage.weights_bytes, "kv": stage.kv_bytes, "compute": stage.compute_bytes}
    return found | {
        "index": stage.index,
        "real": parts,
        "planned": planned,
        "layers": stage.layers[1] - stage.layers[0],
    }


def report(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        real, planned = sum(row["real"].values()), sum(row["planned"].values())
        table.append(
            (
                f"{row['layers']} layers",
                f"{planned / 1e9:.3f}",
                f"{real / 1e9:.3f}",
                error(real, planned),
                error(row["mapped_bytes"], row["shard_bytes"]),
                error(row["resident_bytes"], row["shard_bytes"]),
                f"{row['load_s']:.1f}",
                f"{row['step_s']:.2f}",
            )
        )
    columns = ("stage", "plan, GB", "real, GB", "error", "mapped", "resident", "load, s", "token, s")
    print_table("memory (aim: within 2 %), and file pages against the shard (aim: +2 % at most)", columns, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to put the sparse file; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eldric-70b-", dir=arguments.folder) as scratch:
        local = make_cluster(Path(scratch) / "cluster")
        path = local.folder / "models" / FILE
        local.up(lambda line: None)
        try:
            runs = [dry_run(local.folder) for _ in range(ROUNDS)]
            with Client(folder=local.folder) as client:
                calls, plan = timed_plans(client)
        finally:
            local.down(lambda line: None)
        show_plan(plan, [seconds for _, seconds in runs], calls)
        rows = [] if arguments.plan_only else [load(path, stage) for stage in plan.stages]
        size, disk = path.stat().st_size, path.stat().st_blocks * 512
    if rows:
        report(rows)
    results = {
        "file_bytes": size,
        "disk_bytes": disk,
        "dry_run_command_s": [round(seconds, 3) for _, seconds in runs],
        "plan_call_s": [round(seconds, 4) for seconds in calls],
        "plan": [(stage.worker, *stage.layers) for stage in plan.stages],
        "stages": rows,
    }
    print_json("seventy_b", {"memory": MEMORY}, results)


def timed_plans(client: Client) -> tuple[list[float], Plan]:
    """The plan, and the seconds that each call for it took."""
    stored, seconds = FILE.removesuffix(".gguf"), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        plan = client.plan(stored, context=CONTEXT, slots=SLOTS, chunk=CHUNK, weights="mapped")
        seconds.append(time.perf_counter() - began)
    return seconds, plan


def show_plan(plan: Plan, commands: list[float], calls: list[float]) -> None:
    rows = [
        (stage.worker, f"{stage.layers[0]} to {stage.layers[1] - 1}", *(f"{size / 1e9:.3f}" for size in sizes))
        for stage in plan.stages
        for sizes in [(stage.weights_bytes, stage.kv_bytes, stage.compute_bytes, stage.available_bytes)]
    ]
    title = (
        f"deploy {MODEL} --dry-run: {statistics.median(commands):.2f} s for the command, first {commands[0]:.2f} s; "
        f"{statistics.median(calls) * 1e3:.0f} ms for the call (aim: 1 s from header to plan). GB:"
    )
    print_table(title, ("worker", "layers", "weights", "KV cache", "compute", "available"), rows)


if __name__ == "__main__":
    main()
