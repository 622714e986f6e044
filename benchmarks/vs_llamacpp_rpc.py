"""Is Eldric faster than llama.cpp RPC on the same machine, with the same file, threads and pinning?

    python -m benchmarks.vs_llamacpp_rpc                 Q4_0 and Q4_K_M, three rounds
    python -m benchmarks.vs_llamacpp_rpc --quants q4_0 --rounds 1
    python -m benchmarks.vs_llamacpp_rpc --network       three hosts on slow links; see network_rpc.py; needs root

Two workers of one pinned thread each, on both sides, over encrypted TCP as between machines (--transport shm shows what
one machine gives instead); a 1.1B-shaped Llama with random weights (speed depends on shape,
not on weights). llama.cpp runs at the -ub that is best for its prefill, found in the same run. Rounds are interleaved:
in each, every measurement is made for llama.cpp, for Eldric over two workers, and for Eldric alone on one. Ratios are
of medians; the spread is printed beside them. The last line is JSON.

Ceiling: a token reads every weight once, so one stream cannot be faster than memory bandwidth over the file's size.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import llamacpp
from benchmarks.local_cluster import temporary_cluster
from benchmarks.report import print_json, print_table, spread
from benchmarks.shapes import SHAPES, write_model
from eldric.client import AsyncClient, Client, Finished, find_cluster

STREAMS = (1, 2, 8)
DECODE_TOKENS = 64
SHORT_PROMPT = 16
LONG_PROMPT = 1000
CONTEXT = 1280
UBATCHES = (64, 128, 256, 512)
SLOTS = 8

Generate = Callable[[Sequence[Sequence[int]], int], float]
"""Runs all prompts at once for so many tokens each; returns seconds of wall time."""

Samples = dict[str, dict[str, list[float]]]


def say(line: str) -> None:
    """How far it is, for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def prompt(length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(300, 31_000, length)]


def eldric_generate(folder: Path, model: str) -> Generate:
    async def one(client: AsyncClient, tokens: Sequence[int], count: int) -> None:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "cache_prompt": False}
        async for event in client.generate(model, tokens, **options):
            if isinstance(event, Finished):
                return

    async def all_at_once(prompts: Sequence[Sequence[int]], count: int) -> float:
        async with AsyncClient(find_cluster(folder)) as client:
            await client.router_channel()
            began = time.perf_counter()
            await asyncio.gather(*(one(client, tokens, count) for tokens in prompts))
            return time.perf_counter() - began

    return lambda prompts, count: asyncio.run(all_at_once(prompts, count))


def llama_generate(server: llamacpp.LlamaServer, pool: ThreadPoolExecutor) -> Generate:
    def all_at_once(prompts: Sequence[Sequence[int]], count: int) -> float:
        began = time.perf_counter()
        list(pool.map(lambda tokens: server.complete(tokens, count), prompts))
        return time.perf_counter() - began

    return all_at_once


def decode_rate(generate: Generate, streams: int, seed: int) -> float:
    """Tokens per second of all streams after their first token: a run of one token is taken off."""
    prompts = [prompt(SHORT_PROMPT, seed * 100 + index) for index in range(streams)]
    first = generate(prompts, 1)
    whole = generate(prompts, DECODE_TOKENS + 1)
    return streams * DECODE_TOKENS / (whole - first)


def prefill_rate(generate: Generate, seed: int) -> float:
    return LONG_PROMPT / generate([prompt(LONG_PROMPT, seed)], 1)


def measure(sides: dict[str, Generate], rounds: int) -> Samples:
    """samples[measurement][side]: one figure a round, in tokens per second."""
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for generate in sides.values():
        generate([prompt(LONG_PROMPT, 1)], 2)  # warm: graphs, caches
    for turn in range(rounds):
        for streams in STREAMS:
            for side, generate in sides.items():
                if side != "eldric alone" or streams == 1:
                    samples[f"{streams} streams"][side].append(decode_rate(generate, streams, turn + 2))
                    say(f"round {turn + 1}: {streams} streams, {side}: {samples[f'{streams} streams'][side][-1]:.1f}")
        for side, generate in sides.items():
            samples["prefill"][side].append(prefill_rate(generate, turn + 2))
            say(f"round {turn + 1}: prefill, {side}: {samples['prefill'][side][-1]:.1f}")
    return samples


def best_ubatch(
    programs: Path, model: Path, servers: Sequence[str], pool: ThreadPoolExecutor, ubatches: Sequence[int]
) -> tuple[int, dict[int, float]]:
    """The -ub with the fastest prefill, and all that were tried."""
    rates = {}
    for ubatch in ubatches:
        with llamacpp.llama_server(programs, model, servers, ubatch=ubatch, slots=SLOTS, context=CONTEXT) as server:
            generate = llama_generate(server, pool)
            generate([prompt(LONG_PROMPT, 1)], 1)
            rates[ubatch] = statistics.median(prefill_rate(generate, seed) for seed in (2, 3))
        say(f"llama.cpp RPC at -ub {ubatch}: prefill {rates[ubatch]:.0f} tokens/s")
    return max(rates, key=lambda ubatch: rates[ubatch]), rates


@contextlib.contextmanager
def deployed(client: Client, model: str, name: str, workers: list[str], transport: str) -> Iterator[float]:
    """Yields the seconds from the request to ready."""
    began = time.monotonic()
    client.deploy(
        model, name=name, stages=len(workers), workers=workers, context=CONTEXT, slots=SLOTS, transport=transport
    )
    seconds = time.monotonic() - began
    try:
        yield seconds
    finally:
        client.undeploy(name)


def compare(
    quant: str, rounds: int, ubatches: Sequence[int], folder: Path, model: Path, programs: Path, transport: str
) -> dict[str, Any]:
    name = quant.replace("_", "-")
    pool = ThreadPoolExecutor(max(STREAMS))
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown)
        servers = stack.enter_context(llamacpp.rpc_servers(programs, (0, 1)))
        ubatch, tried = best_ubatch(programs, model, servers, pool, ubatches)
        client = stack.enter_context(Client(folder=folder))
        stored = f"{name}-file"  # a pipeline named like its model would stand for all pipelines of that model
        client.models.add(model, stored)
        starts: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            with llamacpp.llama_server(programs, model, servers, ubatch=ubatch, slots=SLOTS, context=CONTEXT) as server:
                starts["llama.cpp RPC"].append(server.start_s)
            with deployed(client, stored, f"{name}-timed", ["worker-1", "worker-2"], transport) as seconds:
                starts["eldric"].append(seconds)
        server = stack.enter_context(
            llamacpp.llama_server(programs, model, servers, ubatch=ubatch, slots=SLOTS, context=CONTEXT)
        )
        stack.enter_context(deployed(client, stored, name, ["worker-1", "worker-2"], transport))
        stack.enter_context(deployed(client, stored, f"{name}-alone", ["worker-1"], transport))
        sides = {
            "llama.cpp RPC": llama_generate(server, pool),
            "eldric": eldric_generate(folder, name),
            "eldric alone": eldric_generate(folder, f"{name}-alone"),
        }
        samples = measure(sides, rounds)
    report(quant, ubatch, tried, samples, starts)
    return {
        "quant": quant,
        "llamacpp_ubatch": ubatch,
        "llamacpp_prefill_by_ubatch_tokens_per_s": tried,
        "tokens_per_s": {
            kind: {side: spread(values) for side, values in sides_.items()} for kind, sides_ in samples.items()
        },
        "deploy_s": {side: spread(values) for side, values in starts.items()},
    }


def report(quant: str, ubatch: int, tried: dict[int, float], samples: Samples, starts: dict[str, list[float]]) -> None:
    def median(kind: str, side: str) -> float:
        return statistics.median(samples[kind][side])

    def shown(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    one_stream = median("1 streams", "eldric")
    against = {
        "1 streams": f"{one_stream / median('1 streams', 'eldric alone'):.2f}x of one process",
        "2 streams": f"{median('2 streams', 'eldric') / one_stream:.2f}x of one stream",
        "8 streams": f"{median('8 streams', 'eldric') / one_stream:.2f}x of one stream",
        "prefill": f"{median('prefill', 'eldric') / median('prefill', 'eldric alone'):.2f}x of one worker",
    }
    rows = []
    for kind, sides in samples.items():
        ratio = median(kind, "eldric") / median(kind, "llama.cpp RPC")
        rows.append((kind, shown(sides["llama.cpp RPC"]), shown(sides["eldric"]), f"{ratio:.2f}x", against[kind]))
    ratio = statistics.median(starts["eldric"]) / statistics.median(starts["llama.cpp RPC"])
    rows.append(("deploy, seconds", shown(starts["llama.cpp RPC"]), shown(starts["eldric"]), f"{ratio:.2f}x", ""))
    sweep = ", ".join(f"{size}: {rate:.0f}" for size, rate in tried.items())
    title = f"{quant}, tokens/s, median (spread). llama.cpp -ub {ubatch} (prefill at {sweep})"
    print_table(title, ("", "llama.cpp RPC", "eldric, 2 workers", "ratio", "and against ourselves"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quants", nargs="+", default=["q4_0", "q4_k_m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ubatches", type=int, nargs="+", default=UBATCHES, help="of llama.cpp, to choose from")
    parser.add_argument("--transport", default="zmq", help="of Eldric's links: zmq (encrypted TCP), shm or auto")
    parser.add_argument("--network", action="store_true", help="three workers on links of 1 Gbit/s; needs root")
    parser.add_argument("--tokens", type=int, default=DECODE_TOKENS, help="with --network: of each stream")
    parser.add_argument("--rate-mbit", type=float, default=1000.0, help="with --network: of each host's link")
    parser.add_argument("--delay-ms", type=float, default=1.0, help="with --network: added each way")
    arguments = parser.parse_args()
    if arguments.network:
        from benchmarks.network import NetworkUnavailable
        from benchmarks.network_rpc import Settings, run

        try:
            run(Settings(arguments.rounds, arguments.tokens, arguments.rate_mbit * 1e6, arguments.delay_ms))
        except NetworkUnavailable as error:
            raise SystemExit(f"error: {error}") from None
        return
    programs = llamacpp.build()
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="eldric-shapes-") as shapes,
        temporary_cluster(workers=2, options=["--threads", "1", "--pin"]) as folder,
    ):
        for quant in arguments.quants:
            model = write_model(Path(shapes) / f"llama-1.1b-{quant}.gguf", SHAPES["1.1b"], quant)
            results.append(
                compare(quant, arguments.rounds, arguments.ubatches, folder, model, programs, arguments.transport)
            )
    config = {"rounds": arguments.rounds, "shape": "1.1b", "threads": 1, "transport": arguments.transport}
    print_json("vs_llamacpp_rpc", config, results)


if __name__ == "__main__":
    main()
