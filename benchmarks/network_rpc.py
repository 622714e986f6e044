"""Eldric beside llama.cpp RPC on the very same links: `python -m benchmarks.vs_llamacpp_rpc --network`.

Five hosts are network namespaces on links of 1 Gbit/s with 1 ms added each way (network.py; needs root). On `front`:
llama-server, which reads the file from its disk; controller, data worker, router, NFS server. On `store`: the second
data worker, where there are two. On each of three workers: an RPC server of llama.cpp, and Eldric's worker, of one
thread each, each of them in a memory group of nine tenths of the model: a third as pages, and as packed copies, fits.
`front` has no limit: llama-server maps the whole file. Eldric's links are encrypted as they are by default, and
llama.cpp has no encryption. Both are asked on `front`. llama.cpp keeps a cache of tensors over 10 MiB only, which this
shape has hardly any of: it is not measured.

Rounds are interleaved; the table has medians and spreads. A deployment begins with nothing on the workers, unless it
is made "again". Every deployment is held against llama-server's start. Bytes are those of the hosts' devices, where
TCP's large segments count as one frame each.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import llamacpp, memory_groups
from benchmarks.network import Network, network
from benchmarks.network_cluster import NetworkCluster, exported, network_cluster
from benchmarks.report import print_json, print_table, spread
from benchmarks.shapes import SHAPES, write_model
from benchmarks.vs_llamacpp_rpc import Generate, eldric_generate, llama_generate, prompt, say
from eldric.client import Client

WORKERS = ("worker-1", "worker-2", "worker-3")
MOUNTING = ("mounting-1", "mounting-2", "mounting-3")  # Eldric's workers that read from the mount, on the same hosts
FRONT, STORE = "front", "store"
MODEL, CONTEXT, SLOTS, UBATCH = "model", 512, 2, 128
PROMPT = 128  # tokens before the first one that is timed
MEMORY_SHARE = 0.9  # of the model, for each worker's memory group: less than the model, and its own third twice
LLAMA, ELDRIC, ELDRIC_MOUNTING = "llama.cpp RPC", "eldric", "eldric, mounting"
ONE, TWO, CACHED = "deploy over HTTP", "deploy, two stores", "deploy over HTTP again"
MOUNT, MOUNTED = "deploy over NFS", "deploy over NFS again"
AIMS = {  # of Eldric's figure over llama.cpp RPC's
    "1 stream, tokens/s": ">= 1.5x",
    "2 streams, tokens/s": ">= 3.5x",
    f"{ONE}, s": "<= 1.0x",
    f"{TWO}, s": f"<= {1 / 1.7:.2f}x",
    f"{CACHED}, s": "<= 0.2x",
    f"{MOUNT}, s": "<= 1.0x",
    f"{MOUNTED}, s": "<= 0.2x",
}
SENT_AIM = "eldric <= 1.02"

Samples = dict[str, dict[str, list[float]]]
"""samples[measurement][side]: one figure a round."""


@dataclass(frozen=True, slots=True)
class Settings:
    rounds: int
    tokens: int  # of each stream whose speed is measured
    rate_bits: float
    delay_ms: float


class Bench:
    """Everything that runs on the hosts, and the samples."""

    def __init__(self, net: Network, cluster: NetworkCluster, model: Path, programs: Path, settings: Settings) -> None:
        self.net, self.cluster, self.model, self.programs, self.settings = net, cluster, model, programs, settings
        self.samples: Samples = defaultdict(lambda: defaultdict(list))
        self.groups: dict[str, list[Path]] = defaultdict(list)
        self._size = model.stat().st_size

    def limit_memory(self, side: str) -> None:
        """What is started on the workers from now on has a memory group of its own."""
        for worker in WORKERS:
            self.net.limit_memory(worker, int(self._size * MEMORY_SHARE))
            self.groups[side].append(self.net.memory_groups(worker)[-1])

    @contextlib.contextmanager
    def rpc_servers(self) -> Iterator[list[str]]:
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    llamacpp.rpc_server(self.programs, self.net.addresses[worker], self.net.command(worker, []))
                )
                for worker in WORKERS
            ]

    @contextlib.contextmanager
    def llama_server(self, servers: list[str], kind: str = "") -> Iterator[llamacpp.LlamaServer]:
        """Its start is a sample of `kind`, if that is named."""
        before = self._sent((FRONT,))
        with llamacpp.llama_server(
            self.programs, self.model, servers, ubatch=UBATCH, slots=SLOTS, context=CONTEXT
        ) as server:
            if kind:
                self._note(kind, LLAMA, server.start_s, self._sent((FRONT,)) - before)
            yield server

    @contextlib.contextmanager
    def deployed(self, client: Client, kind: str = "", workers: Sequence[str] = WORKERS) -> Iterator[None]:
        """The model is up as the pipeline "bench"; its deployment is a sample of `kind`, if that is named."""
        before, began = self._sent((FRONT, STORE)), time.monotonic()
        client.deploy(MODEL, name="bench", stages=3, workers=list(workers), context=CONTEXT, slots=SLOTS)
        if kind:
            self._note(kind, ELDRIC, time.monotonic() - began, self._sent((FRONT, STORE)) - before)
        try:
            yield
        finally:
            client.undeploy("bench")

    def forget(self) -> None:
        """Empty the workers' caches."""
        for worker in WORKERS:
            shutil.rmtree(self.cluster.folder / worker / "cache", ignore_errors=True)

    def start_workers(self, names: Sequence[str], models: str) -> None:
        memory = str(int(self._size * MEMORY_SHARE))
        for host, name in zip(WORKERS, names, strict=True):
            self.cluster.launch(host, "worker", name, "--models", models, "--threads", "1", "--memory", memory)
        self.cluster.wait()
        self.cluster.wait_for_workers(FRONT, names)

    def _sent(self, hosts: Sequence[str]) -> int:
        return sum(map(self.net.sent_bytes, hosts))

    def _note(self, kind: str, side: str, seconds: float, sent: int) -> None:
        self.samples[f"{kind}, s"][side].append(seconds)
        self.samples[f"{kind}, sent"][side].append(sent / self._size)
        say(f"{kind}, {side}: {seconds:.2f} s, {sent / self._size:.3f} of the model sent")

    def measure(self, side: str, generate: Generate, seed: int) -> None:
        """A round of tokens."""
        tokens, hosts = self.settings.tokens, (FRONT, *WORKERS)
        first = generate([prompt(PROMPT, seed)], 1)
        self.samples[f"first token after {PROMPT}, s"][side].append(first)
        for streams in (1, 2):
            prompts = [prompt(16, seed * 100 + index) for index in range(streams)]
            one = generate(prompts, 1)
            before = self._sent(hosts)
            whole = generate(prompts, tokens + 1)
            sent = self._sent(hosts) - before
            kind = f"{streams} stream{'s' * (streams > 1)}"
            self.samples[f"{kind}, tokens/s"][side].append(streams * tokens / (whole - one))
            self.samples[f"{kind}, kB per token"][side].append(sent / streams / (tokens + 1) / 1e3)
            say(f"{side}: {kind} {self.samples[f'{kind}, tokens/s'][side][-1]:.1f} tokens/s, first {first:.3f} s")


def run(settings: Settings) -> None:
    """Measure and print. Raises NetworkUnavailable where such networks cannot be made."""
    programs = llamacpp.build()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eldric-network-")))
        rate, delay = settings.rate_bits, settings.delay_ms
        net = stack.enter_context(network(FRONT, STORE, *WORKERS, rate_bits=rate, delay_ms=delay))
        model = write_model(scratch / "model.gguf", SHAPES["1.1b"], "q4_0")
        cluster = stack.enter_context(network_cluster(net, scratch / "cluster"))
        stack.enter_context(net.inside(FRONT))
        bench = Bench(net, cluster, model, programs, settings)
        bench.limit_memory(LLAMA)
        servers = stack.enter_context(bench.rpc_servers())
        bench.limit_memory(ELDRIC)
        (store := scratch / "store").mkdir()
        cluster.start(FRONT, "controller")
        cluster.launch(FRONT, "data", "data", "--models", str(store))
        cluster.launch(FRONT, "router")
        bench.start_workers(WORKERS, "http")
        for worker in WORKERS:  # those that mount the store do not see it on the disk that all hosts share
            net.hide(worker, store)
        bench.limit_memory(ELDRIC_MOUNTING)
        client = stack.enter_context(Client(folder=cluster.folder))
        client.models.add(model, MODEL)
        stack.enter_context(exported(cluster, FRONT, store))
        for _ in range(settings.rounds):
            compare_deployments(bench, client, servers, scratch)
        compare_tokens(bench, client, servers)
        peaks = {
            side: max(memory_groups.peak_bytes(group) for group in groups) for side, groups in bench.groups.items()
        }
    report(bench, peaks)


def compare_deployments(bench: Bench, client: Client, servers: list[str], scratch: Path) -> None:
    """A round."""
    with bench.llama_server(servers, ONE):
        pass
    bench.forget()
    with bench.deployed(client, ONE):
        pass
    with bench.deployed(client, CACHED):
        pass
    bench.cluster.start(STORE, "data", "data-2", "--models", str(scratch / "store-2"))
    while "data-2" not in {node.name for node in client.nodes() if node.state == "up"}:
        time.sleep(0.05)
    client.models.replicate(MODEL)
    bench.forget()
    with bench.deployed(client, TWO):
        pass
    bench.cluster.stop("data-2")
    bench.start_workers(MOUNTING, "mount")
    for kind in (MOUNT, MOUNTED):
        with bench.deployed(client, kind, MOUNTING):
            pass
    for worker in MOUNTING:
        bench.cluster.stop(worker)


def compare_tokens(bench: Bench, client: Client, servers: list[str]) -> None:
    pool = ThreadPoolExecutor(2)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown)
        sides = {
            LLAMA: llama_generate(stack.enter_context(bench.llama_server(servers)), pool),
            ELDRIC: eldric_generate(bench.cluster.folder, "bench"),
        }
        stack.enter_context(bench.deployed(client))
        for generate in sides.values():
            generate([prompt(PROMPT, 1)] * 2, 2)  # warm: graphs, connections
        for turn in range(bench.settings.rounds):
            for side, generate in sides.items():
                bench.measure(side, generate, turn + 2)


def report(bench: Bench, peaks: dict[str, int]) -> None:
    def shown(values: list[float]) -> str:
        if not values:
            return ""
        digits = 2 if max(values) < 100 else 0
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    rows = []
    for kind, sides in bench.samples.items():
        measure = kind.rpartition(", ")[2]
        theirs = sides[LLAMA] or bench.samples[f"{ONE}, {measure}"][LLAMA]
        ratio = statistics.median(sides[ELDRIC]) / statistics.median(theirs)
        aim = SENT_AIM if measure == "sent" else AIMS.get(kind, "")
        rows.append((kind, shown(sides[LLAMA]), shown(sides[ELDRIC]), f"{ratio:.2f}x", aim))
    settings = bench.settings
    title = (
        f"three workers, {settings.rate_bits / 1e6:.0f} Mbit/s, {settings.delay_ms:g} ms each way, "
        f"each with memory for {MEMORY_SHARE:.0%} of the model; sent: of the model; medians (spread)"
    )
    print_table(title, ("", LLAMA, ELDRIC, "ratio", "aim"), rows)
    config: dict[str, Any] = {
        "rounds": settings.rounds,
        "tokens": settings.tokens,
        "rate_bits": settings.rate_bits,
        "delay_ms": settings.delay_ms,
        "shape": "1.1b",
        "quant": "q4_0",
        "memory_share": MEMORY_SHARE,
        "peak_memory_bytes": peaks,
    }
    results = {kind: {side: spread(v) for side, v in sides.items() if v} for kind, sides in bench.samples.items()}
    print_json("vs_llamacpp_rpc_network", config, results)
