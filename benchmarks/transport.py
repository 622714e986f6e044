"""What does a hop between two stages cost, beside the bare TCP socket that it cannot beat?

Usage: python -m benchmarks.transport [--rounds 3] [--seconds 0.3] [--sizes 8192 16384 ...] [--cpus 0 1]

The ceiling is a blocking TCP socket with NODELAY between two processes, measured in the same run. Transports look for a
frame for a moment before they sleep, which a blocking socket does not; a socket that does so, too, and ZeroMQ that does
not are measured beside them. Every transport that is installed sends hidden states with the header of a decode step:
round trips (two hops) one at a time, then a stream that is acknowledged once, at its end. All take turns in each round,
because a machine's speed changes from one minute to the next. inproc runs between two threads of one process, all else
between two processes. The last line is JSON.
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import percentile, print_json, print_table, spread
from benchmarks.transport_ends import NearEnd, Variant, pin, socket_ends, transport_ends
from eldric.transport.registry import SAME_PROCESS, offers

SIZES = tuple(1024 * kib for kib in (8, 16, 64, 256, 1024, 4096, 16384))
CEILING = "tcp socket"
SPINNING = "tcp socket, spinning"
VARIANTS = (
    Variant("zmq, plain", "zmq"),
    Variant("zmq, plain, sleeping", "zmq", spins=False),
    Variant("zmq, CURVE", "zmq", encrypt=True),
    Variant("shm", "shm", encrypt=True),
    Variant("ucx, tcp", "ucx", ucx_ways="tcp"),
    Variant("ucx, shared memory", "ucx", ucx_ways="sm,tcp"),
    Variant("inproc", "inproc", encrypt=True),
)
FEWEST = 5  # round trips in a round, however long they take
STREAM_BYTES = 32 * 1024 * 1024
MOST_FRAMES = 1000


@dataclass(slots=True)
class Measured:
    """One variant at one payload size."""

    round_trips_us: list[float] = field(default_factory=list)  # of all rounds
    medians_us: list[float] = field(default_factory=list)  # of each round
    streams_mb_s: list[float] = field(default_factory=list)  # payload, 10^6 bytes a second, of each round


def measure(end: NearEnd, payload: memoryview, seconds: float, into: Measured) -> None:
    """One round."""
    end.round_trip(payload)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < until:
        began = time.perf_counter_ns()
        end.round_trip(payload)
        times.append((time.perf_counter_ns() - began) / 1000)
    into.round_trips_us += times
    into.medians_us.append(percentile(times, 0.5))
    frames = max(2, min(MOST_FRAMES, STREAM_BYTES // payload.nbytes))
    began = time.perf_counter_ns()
    end.stream(payload, frames)
    into.streams_mb_s.append(frames * payload.nbytes * 1000 / (time.perf_counter_ns() - began))


def run(sizes: Sequence[int], rounds: int, seconds: float, cpus: Sequence[int]) -> dict[tuple[str, int], Measured]:
    """All variants in turns. cpus: cores of this process and of the other ends."""
    far = cpus[1:] or cpus
    pin(cpus[:1])
    results: dict[tuple[str, int], Measured] = {}
    with ExitStack() as stack:
        ends = {
            CEILING: stack.enter_context(socket_ends(max(sizes), far)),
            SPINNING: stack.enter_context(socket_ends(max(sizes), far, spins=True)),
        }
        for variant in VARIANTS:
            if variant.scheme in (*offers(), *SAME_PROCESS):
                ends[variant.name] = stack.enter_context(transport_ends(variant, far))
        for size in sizes:
            payload = memoryview(os.urandom(size))
            for _ in range(rounds):
                for name, end in ends.items():
                    measure(end, payload, seconds, results.setdefault((name, size), Measured()))
    return results


def two_cores() -> list[int]:
    """One for each end, as two stages have; a scheduler may put both on one, where a hop costs next to nothing."""
    return sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []


def summary(name: str, size: int, measured: Measured, ceiling: Measured) -> dict[str, Any]:
    p50 = percentile(measured.round_trips_us, 0.5)
    return {
        "transport": name,
        "payload_bytes": size,
        "round_trip_p50_us": p50,
        "round_trip_p99_us": percentile(measured.round_trips_us, 0.99),
        "round_trip_ratio": p50 / percentile(ceiling.round_trips_us, 0.5),
        "round_median_us": spread(measured.medians_us),
        "stream_mb_s": spread(measured.streams_mb_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="for round trips of one variant, size and round")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="payload bytes, multiples of 16")
    parser.add_argument(
        "--cpus", type=int, nargs="*", default=two_cores(), help="the first for this process, others for the other"
    )
    arguments = parser.parse_args()
    results = run(arguments.sizes, arguments.rounds, arguments.seconds, arguments.cpus)
    rows = [summary(name, size, measured, results[CEILING, size]) for (name, size), measured in results.items()]
    for size in arguments.sizes:
        print_table(
            f"payload of {size // 1024} KiB (ceiling: {CEILING})",
            ("transport", "p50 us", "p99 us", "p50 / ceiling", "median of rounds us", "stream MB/s"),
            [
                (
                    row["transport"],
                    row["round_trip_p50_us"],
                    row["round_trip_p99_us"],
                    f"{row['round_trip_ratio']:.2f}",
                    f"{row['round_median_us']['min']:.0f} to {row['round_median_us']['max']:.0f}",
                    f"{row['stream_mb_s']['min']:.0f} to {row['stream_mb_s']['max']:.0f}",
                )
                for row in rows
                if row["payload_bytes"] == size
            ],
        )
    config = {"rounds": arguments.rounds, "seconds": arguments.seconds, "cpus": arguments.cpus}
    print_json("transport", config, rows)


if __name__ == "__main__":
    main()
