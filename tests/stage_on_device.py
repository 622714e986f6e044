"""Compares a model on a device with the same model on the CPU, in a process of its own.

    python -m tests.stage_on_device CASES.json

Which devices there are is settled when ggml is loaded, hence the process. CASES.json: a list of {"path", "device",
"cuts"}. Prints a list of {"prompt", "decode"}: how far logits differ behind prompts of many lengths, and of sequences
that are decoded together; the root of the mean square of all rows, the largest one, in units of the logits' deviation.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.stages import Chain, random_prompt

_LENGTHS = {0: 5, 1: 255, 2: 64, 3: 300}  # of the prompts, by slot: around chunks of 32 and blocks of 256 cells
_STEPS = 4


def main() -> None:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        path, cuts = Path(case["path"]), case["cuts"]
        with Chain(path) as chain:
            expected = _logits(chain)
        with Chain(path, cuts, device=case["device"]) as chain:
            found = _logits(chain)
        results.append({part: _difference(found[part], expected[part]) for part in expected})
    print(json.dumps(results))


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(found - expected).mean(axis=1)).max() / expected.std())


def _logits(chain: Chain) -> dict[str, NDArray[np.float32]]:
    """Of prompts in all slots, and of steps that decode all of them, then some of them in another order."""
    vocab = chain.spec.vocab_size
    prompts = {slot: random_prompt(vocab, length, seed=slot) for slot, length in _LENGTHS.items()}
    behind = [chain.prefill(slot, prompt)[0] for slot, prompt in prompts.items()]
    following = random_prompt(vocab, 2 * _STEPS, seed=9)
    decoded = []
    for step in range(_STEPS):
        rows = chain.decode({slot: (len(prompt) + step, following[step]) for slot, prompt in prompts.items()})
        decoded += [rows[slot] for slot in prompts]
    for step in range(_STEPS, 2 * _STEPS):
        rows = chain.decode({slot: (len(prompts[slot]) + step, following[step]) for slot in (3, 1)})
        decoded += [rows[3], rows[1]]
    again = chain.prefill(1, prompts[2])[0]  # over what the slot held
    return {"prompt": np.stack([*behind, again]), "decode": np.stack(decoded)}


if __name__ == "__main__":
    main()
