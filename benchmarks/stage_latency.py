"""Where does the time of a token go, stage by stage?

    python -m benchmarks.stage_latency --dir CLUSTER --model NAME     a pipeline that runs
    python -m benchmarks.stage_latency                                 a local cluster of its own, SmolLM2 on 2 workers

Generates tokens and follows every step around the ring. Per stage:

    queue    the step had been sent to the stage, which was still busy with the one before
    wire     from there (or from when the stage fell idle, had it not been) until the stage's thread had the frame
    python   the stage's own code: all from having the frame to encoding the next one, but for the compute library
    compute  the time within the compute library

Stages on one machine share a clock; between machines queue and wire are left out. The last line is JSON; --trace FILE
writes the steps in the trace event format, which ui.perfetto.dev opens.
"""

import argparse
import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.local_cluster import deployed, temporary_cluster
from benchmarks.report import percentile, print_json, print_table
from eldric.client import AsyncClient, Finished, find_cluster
from eldric.errors import NotFound
from eldric.v1 import frame_pb2, stage_pb2, stage_pb2_grpc
from tests.models import smollm2

PARTS = ("queue", "wire", "python", "compute")
PROMPT = "Write one sentence about the sea."
#: Steps at the beginning that are not counted: graphs are built then.
WARM_UP_STEPS = 8


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One step in one stage, in microseconds. nan where two clocks cannot be compared."""

    queue: float
    wire: float
    python: float
    compute: float


def split(steps: Sequence[stage_pb2.StepTrace]) -> dict[int, list[StageTimes]]:
    """The times of decode steps, by stage."""
    times: dict[int, list[StageTimes]] = defaultdict(list)
    idle_since: dict[int, int] = {}
    for step in steps:
        sent_by = None
        for stage in step.stages:
            if not step.prefill:
                times[stage.stage].append(_stage_times(stage, sent_by, idle_since.get(stage.stage)))
            idle_since[stage.stage] = stage.sent_ns
            sent_by = stage
    return times


def _stage_times(
    stage: frame_pb2.StageTrace, sent_by: frame_pb2.StageTrace | None, idle_since: int | None
) -> StageTimes:
    queue = wire = 0.0
    if sent_by is not None:
        if sent_by.clock != stage.clock or stage.clock == 0:
            queue = wire = math.nan
        else:
            free = max(sent_by.sent_ns, idle_since or 0)
            queue = (free - sent_by.sent_ns) / 1e3
            wire = (stage.received_ns - free) / 1e3
    python = (stage.began_ns - stage.received_ns + stage.sent_ns - stage.computed_ns) / 1e3
    return StageTimes(queue, wire, python, (stage.computed_ns - stage.began_ns) / 1e3)


#: A viewer takes 0 for a processor's idle thread and a process's own number for its main thread.
_PIPELINE, _FIRST_STAGE = 1, 2


def trace_events(steps: Sequence[stage_pb2.StepTrace]) -> list[dict[str, Any]]:
    """Trace event format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU"""
    events: list[dict[str, Any]] = []
    for step in steps:
        kind = "prefill" if step.prefill else "decode"
        for stage in step.stages:
            spans = (
                (f"{kind} {step.rows}", stage.began_ns, stage.computed_ns),
                ("python in", stage.received_ns, stage.began_ns),
                ("python out", stage.computed_ns, stage.sent_ns),
            )
            for name, begin, end in spans:
                events.append(
                    {
                        "name": name,
                        "cat": kind,
                        "ph": "X",
                        "ts": begin / 1e3,
                        "dur": (end - begin) / 1e3,
                        "pid": _PIPELINE,
                        "tid": _FIRST_STAGE + stage.stage,
                        "args": {"step": step.step, "rows": step.rows},
                    }
                )
    events.append({"name": "process_name", "ph": "M", "pid": _PIPELINE, "args": {"name": "pipeline"}})
    for number in sorted({stage.stage for step in steps for stage in step.stages}):
        place = {"ph": "M", "pid": _PIPELINE, "tid": _FIRST_STAGE + number}
        events.append({"name": "thread_name", **place, "args": {"name": f"stage {number}"}})
        events.append({"name": "thread_sort_index", **place, "args": {"sort_index": number}})
    return events


async def follow(client: AsyncClient, model: str, streams: int, tokens: int) -> list[stage_pb2.StepTrace]:
    """Generate `streams` answers of `tokens` tokens at once, and return the steps that were made for them."""
    [pipeline] = await client.status(model)
    head_worker = pipeline.stages[0].worker
    address = next(worker.address for worker in await client.workers() if worker.name == head_worker)
    stub = stage_pb2_grpc.StageStub(client.channel(address, "worker", head_worker))
    call = stub.Trace(stage_pb2.TraceRequest(pipeline_id=pipeline.id))
    steps: list[stage_pb2.StepTrace] = []

    async def read() -> None:
        async for step in call:
            steps.append(step)

    reader = asyncio.ensure_future(read())
    await call.initial_metadata()
    try:
        await asyncio.gather(*(_generate(client, model, tokens) for _ in range(streams)))
        await asyncio.sleep(0.2)  # the last step's message is on its way
    finally:
        call.cancel()
        await asyncio.wait([reader])
        await call.code()
    return steps


async def _generate(client: AsyncClient, model: str, tokens: int) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
    async for event in client.generate(model, PROMPT, **options):
        if isinstance(event, Finished):
            return


def report(steps: Sequence[stage_pb2.StepTrace], config: dict[str, Any]) -> None:
    times = split(steps)
    rows, results = [], []
    for stage, entries in sorted(times.items()):
        entries = entries[WARM_UP_STEPS:]
        for part in PARTS:
            values = [getattr(entry, part) for entry in entries]
            known = [value for value in values if not math.isnan(value)]
            marks = {f"p{share}_us": percentile(known, share / 100) for share in (50, 95, 99)}
            rows.append((f"{stage} {part}", *(f"{value:.0f}" for value in marks.values())))
            results.append({"stage": stage, "part": part, "steps": len(known), **marks})
    turn = [(step.returned_ns - step.stages[0].received_ns) / 1e3 for step in steps[WARM_UP_STEPS:] if not step.prefill]
    marks = {f"p{share}_us": percentile(turn, share / 100) for share in (50, 95, 99)}
    rows.append(("whole step", *(f"{value:.0f}" for value in marks.values())))
    results.append({"stage": None, "part": "step", "steps": len(turn), **marks})
    print_table("decode steps, microseconds", ("stage and part", "p50", "p95", "p99"), rows)
    print_json("stage_latency", config, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="folder of a running local cluster")
    parser.add_argument("--model", default="", help="name of a pipeline that runs")
    parser.add_argument("--workers", type=int, default=2, help="of the benchmark's own cluster")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--trace", type=Path, help="write a trace for ui.perfetto.dev")
    arguments = parser.parse_args()
    config = {"streams": arguments.streams, "tokens": arguments.tokens, "workers": arguments.workers}

    async def measure(folder: Path | None, model: str) -> list[stage_pb2.StepTrace]:
        async with AsyncClient(find_cluster(folder)) as client:
            await _generate(client, model, WARM_UP_STEPS)
            return await follow(client, model, arguments.streams, arguments.tokens)

    if arguments.model:
        steps = asyncio.run(measure(arguments.dir, arguments.model))
    else:
        with (
            temporary_cluster(workers=arguments.workers, options=["--threads", "1", "--pin"]) as folder,
            deployed(folder, smollm2(), "smollm2", stages=arguments.workers, context=1024),
        ):
            steps = asyncio.run(measure(folder, "smollm2"))
    if not steps:
        raise NotFound("no step was followed")
    if arguments.trace:
        arguments.trace.write_text(json.dumps({"traceEvents": trace_events(steps)}))
    report(steps, config)


if __name__ == "__main__":
    main()
