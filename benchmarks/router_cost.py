"""What does a streamed token cost the router?

    python -m benchmarks.router_cost [--tokens 600] [--interval-ms 4] [--streams 1 8]

A head that computes nothing gives each stream a token every interval, through a router in a process of its own, to
clients that read a streamed chat. Counted is the CPU time of the router's process per token, from gRPC message to
server-sent event. The floor is a process that only reads the same messages from the same head over gRPC. The last
line is JSON.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.report import print_json, print_table
from eldric.channels import channel
from eldric.config import NodeConfig
from eldric.node_file import read
from eldric.router.config import RouterConfig
from eldric.router.main import run
from eldric.security import Identity
from eldric.v1 import inference_pb2, inference_pb2_grpc
from tests.fake_cluster import FakeCluster, Say, fake_cluster, http_of, until

ROUNDS = 3


async def serve_router(folder: Path, controller: str) -> None:
    """The process that is measured."""
    await run(RouterConfig(NodeConfig("router", "measured", folder, http_port=0, controllers=(controller,))))


async def read_bare(folder: Path, head: str, streams: int) -> None:
    """The floor: reads the streams, prints the CPU time per token in microseconds."""

    async def one(stub: "inference_pb2_grpc.InferenceAsyncStub") -> int:
        call: Any = stub.Generate(inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=[1])))
        count = 0
        while (message := await call.read()) is not grpc.aio.EOF:
            count += message.HasField("delta")
        return count

    async with channel(head, Identity.load(folder), "worker") as connection:
        stub = inference_pb2_grpc.InferenceStub(connection)
        began = time.process_time()
        tokens = await asyncio.gather(*(one(stub) for _ in range(streams)))
        print((time.process_time() - began) / sum(tokens) * 1e6)


async def measure(cluster: FakeCluster, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Microseconds of CPU per token, by the number of streams; medians over the rounds, interleaved."""
    cluster.authority.issue_identity("router", "measured").save(folder := cluster.folder / "measured")
    cluster.head.say = _paced(cluster.words("Once upon a time there was a dog."), arguments)
    router = await _start("router", str(folder), cluster.controller_node.grpc_address, cpu=1)
    try:
        await until(lambda: (read(folder) or {}).get("http_url"))
        url = str((read(folder) or {})["http_url"])
        async with http_of(cluster) as http:
            while not (await http.get(f"{url}/v1/models")).json()["data"]:
                await asyncio.sleep(0.05)
        found: dict[int, dict[str, list[float]]] = {n: {"router_us": [], "floor_us": []} for n in arguments.streams}
        for _ in range(ROUNDS):
            for streams, costs in found.items():
                costs["router_us"].append(await _cost(psutil.Process(router.pid), url, streams, arguments.tokens))
                head = cluster.head_nodes["w1"].grpc_address
                bare = await _start("bare", str(folder), head, str(streams), cpu=1)
                costs["floor_us"].append(float((await bare.communicate())[0]))
    finally:
        router.terminate()
        await router.wait()
    return {n: {name: statistics.median(values) for name, values in costs.items()} for n, costs in found.items()}


def _paced(words: list[int], arguments: argparse.Namespace) -> Say:
    async def say(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        for number in range(arguments.tokens):
            await asyncio.sleep(arguments.interval_ms / 1e3)
            yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=words[number % len(words)])])

    return say


async def _start(*arguments: str, cpu: int) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "benchmarks.router_cost", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    if hasattr(os, "sched_setaffinity") and cpu < (os.cpu_count() or 1):
        os.sched_setaffinity(process.pid, {cpu})
    return process


async def _cost(process: psutil.Process, url: str, streams: int, tokens: int) -> float:
    before = process.cpu_times()
    await asyncio.gather(*(_read_chat(url) for _ in range(streams)))
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (streams * tokens) * 1e6


async def _read_chat(url: str) -> None:
    """Reads a streamed chat without looking at it: a client's cost is not the question."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
    answer = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    if b"[DONE]" not in answer:
        raise RuntimeError(f"a stream did not end: {answer[-300:]!r}")


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with fake_cluster(Path(folder)) as cluster:
            found = await measure(cluster, arguments)
    rows = [(n, each["floor_us"], each["router_us"], each["router_us"] - each["floor_us"]) for n, each in found.items()]
    print_table("CPU per token, us", ("streams", "gRPC alone", "router", "difference"), rows)
    print_json("router_cost", vars(arguments), [{"streams": n, **costs} for n, costs in found.items()])


if __name__ == "__main__":
    if sys.argv[1:2] == ["router"]:
        asyncio.run(serve_router(Path(sys.argv[2]), sys.argv[3]))
    elif sys.argv[1:2] == ["bare"]:
        asyncio.run(read_bare(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--tokens", type=int, default=600, help="tokens of each stream")
        parser.add_argument("--interval-ms", type=float, default=4.0, help="between two tokens of a stream")
        parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="streams at once")
        asyncio.run(main(parser.parse_args()))
