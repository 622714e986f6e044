"""What benchmarks print: where they ran, percentiles, a table, and one JSON document as the last line."""

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


def host() -> dict[str, Any]:
    """The machine that measured."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"cpu": model, "cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total}


def git_sha() -> str | None:
    """The commit that was measured, with a mark when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        sha = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("+" if dirty else "")


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; nan for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(width=max(100, Console().width))
    console.print(table)


def print_json(benchmark: str, config: dict[str, Any], results: Any) -> None:
    """The last line of every benchmark."""
    document = {
        "benchmark": benchmark,
        "git_sha": git_sha(),
        "host": host(),
        "config": config,
        "results": results,
    }
    print(json.dumps(document))
