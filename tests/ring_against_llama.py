"""Compares rings of stages with libllama, on the CPU variant that libllama was built for, in a process of its own.

    ELDRIC_GGML_VARIANT=haswell python -m tests.ring_against_llama CASES.json

ggml is loaded once in a process, with one variant, hence the process. CASES.json: a list of {"path", "stages",
"prompts", "count"}. Prints for each a list of {"ours", "reference"}: the greedy tokens that follow each prompt.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.llama_reference import LlamaReference
from tests.rings import even, ring

CONTEXT, CHUNK = 512, 64


async def tokens_of(case: dict[str, Any]) -> list[list[int]]:
    path, count = Path(case["path"]), case["count"]
    # As libllama computes: weights repacked, and a lone row not padded, as exact mode does with f16.
    options: dict[str, Any] = {"context": CONTEXT, "chunk": CHUNK, "weights": "repacked", "exact": False}
    async with ring(path, even(path, case["stages"]), **options) as pipeline:
        return [await pipeline.generate(prompt, count, ignore_eos=True) for prompt in case["prompts"]]


def main() -> None:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        ours = asyncio.run(tokens_of(case))
        with LlamaReference(Path(case["path"]), CONTEXT) as reference:
            expected = [reference.greedy(prompt, case["count"], CHUNK)[0] for prompt in case["prompts"]]
        results.append({"ours": ours, "reference": expected})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
