"""What does a conversation save by going on from where its last turn ended?

    python -m benchmarks.conversation [--rounds 3] [--turns 6] [--asked 60] [--answered 40] [--quant q4_0]

Two workers of one pinned thread each, a 1.1B-shaped Llama. In each turn, so many tokens are asked and answered; the
time from the request to the first token is taken with what the slot holds of the turns before, and once more with all
of the prompt computed, one after the other in every turn and round. Both answers must be the same. The last line is
JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.local_cluster import deployed, temporary_cluster
from benchmarks.report import print_json, print_table, spread
from benchmarks.shapes import SHAPES, write_model
from benchmarks.vs_llamacpp_rpc import prompt
from eldric.client import Client, Delta

NAME = "talk"


def answer(client: Client, tokens: list[int], count: int, *, cached: bool) -> tuple[float, list[int]]:
    """Milliseconds until the first token, and all tokens."""
    first, found = 0.0, []
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "cache_prompt": cached}
    began = time.perf_counter()
    for event in client.generate(NAME, tokens, **options):
        if isinstance(event, Delta):
            first = first or time.perf_counter() - began
            found += [token.id for token in event.tokens]
    return first * 1e3, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--asked", type=int, default=60, help="tokens of each question")
    parser.add_argument("--answered", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--quant", default="q4_0")
    given = parser.parse_args()
    times: dict[int, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    with (
        tempfile.TemporaryDirectory(prefix="eldric-shapes-") as shapes,
        temporary_cluster(workers=2, options=["--threads", "1", "--pin"]) as folder,
    ):
        model = write_model(Path(shapes) / "model.gguf", SHAPES["1.1b"], given.quant)
        context = given.turns * (given.asked + given.answered) + 1
        with deployed(folder, model, NAME, stages=2, context=context, transport="zmq") as client:
            answer(client, prompt(given.asked, 0), 2, cached=False)  # warm: graphs, connections
            for turn in range(given.rounds):
                said: list[int] = []
                for index in range(given.turns):
                    said += prompt(given.asked, 1 + turn * given.turns + index)
                    taken, goes_on = answer(client, said, given.answered, cached=True)
                    anew, expected = answer(client, said, given.answered, cached=False)
                    if goes_on != expected:
                        raise SystemExit(f"error: turn {index + 1} was answered differently when it was computed anew")
                    times[len(said)][True].append(taken)
                    times[len(said)][False].append(anew)
                    said += goes_on
    rows = []
    for length, both in times.items():
        medians = [statistics.median(both[cached]) for cached in (False, True)]
        rows.append((length, *(f"{median:.0f}" for median in medians), f"{medians[1] / medians[0]:.2f}x"))
    print_table("first token, ms, medians", ("prompt", "computed anew", "gone on", "ratio"), rows)
    results = [
        {"prompt": length, "anew_ms": spread(both[False]), "cached_ms": spread(both[True])}
        for length, both in times.items()
    ]
    print_json("conversation", vars(given), results)


if __name__ == "__main__":
    main()
