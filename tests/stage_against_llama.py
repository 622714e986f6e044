"""Compares a whole model with libllama, on the CPU variant that libllama was built for, in a process of its own.

    python -m tests.stage_against_llama CASES.json

ggml is loaded once in a process, with one variant, hence the process. CASES.json: a list of {"path", "prompt",
"count", "options"}. Prints a list of {"same_tokens", "largest_difference", "deviation"}.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.llama_reference import LlamaReference
from tests.stages import Chain


def main() -> None:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(case["path"])
        with LlamaReference(path) as reference:
            tokens, logits = reference.greedy(case["prompt"], case["count"], case["options"]["chunk"])
        with Chain(path, **case["options"]) as chain:
            ours, our_logits = chain.greedy(case["prompt"], case["count"])
        results.append(
            {
                "same_tokens": ours == tokens,
                "largest_difference": float(np.abs(our_logits - logits).max()),
                "deviation": float(logits.std()),
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
