"""How long does it take to read the header of a model with a wide vocabulary?

    python -m benchmarks.header

Writes a header like that of a Llama 3 file (128,256 tokens with scores and types, 280,147 merges, 720 tensors), opens
it again and again and lists its tensors. Ceiling: reading the same bytes from the page cache once. The last line is
JSON.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from benchmarks.report import print_json, print_table, spread
from eldric.engine.gguf import ModelFile

TOKENS, MERGES, LAYERS = 128_256, 280_147, 80
LETTERS = "abcdefghijklmnopqrstuvwxyzĠéßд"


def write(path: Path) -> None:
    rng = random.Random(1)

    def words(count: int, least: int, most: int) -> list[str]:
        return ["".join(rng.choices(LETTERS, k=rng.randint(least, most))) for _ in range(count)]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(words(TOKENS, 1, 12))
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges(words(MERGES, 3, 14))
    for layer in range(LAYERS):
        for name in "abcdefghi":
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def milliseconds(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def open_and_list(path: Path) -> int:
    with ModelFile.open(path) as model:
        return len(model.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.gguf"
        write(path)
        results = {
            "read the bytes (ceiling)": milliseconds(path.read_bytes, arguments.rounds),
            "open and list tensors": milliseconds(lambda: open_and_list(path), arguments.rounds),
        }
        size = path.stat().st_size
    rows = [(name, *(f"{value:.1f}" for value in spread(times).values())) for name, times in results.items()]
    print_table(f"header of {size / 1e6:.1f} MB, milliseconds", ("", "median", "min", "max"), rows)
    print_json("header", {"rounds": arguments.rounds, "bytes": size}, {k: spread(v) for k, v in results.items()})


if __name__ == "__main__":
    main()
