"""Three workers on hosts of their own, each with less memory than the model: what a deployment moves, and what it says.

Needs root: the hosts are network namespaces with memory limits (benchmarks/network.py).
"""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import memory_groups
from benchmarks.network import Network, network, why_not
from benchmarks.network_cluster import NetworkCluster, exported, network_cluster
from benchmarks.shapes import Shape, write_model
from eldric.data.ganesha import INSTALL, PROGRAM
from eldric.nfs.mounting import fuse_problem, kernel_can
from tests.stages import Chain, random_prompt

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

WORKERS = ("worker-1", "worker-2", "worker-3")
SHAPE = Shape(layers=12, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=2048, context=512)
TOKENS = 12
#: What a block or a read-ahead reaches beyond both ends of a shard.
EDGES_BYTES = 2 << 20

GENERATE = """
import json, sys
from eldric.client import Client, Delta
folder, model, prompt, count = sys.argv[1:]
with Client(folder=folder) as client:
    events = client.generate(model, json.loads(prompt), max_tokens=int(count), temperature=0.0, ignore_eos=True)
    print(json.dumps([token.id for event in events if isinstance(event, Delta) for token in event.tokens]))
"""


def why_not_mounted() -> str:
    if shutil.which(PROGRAM) is None:
        return f"there is no {PROGRAM}: {INSTALL}"
    return "" if kernel_can() else fuse_problem()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_model(tmp_path_factory.mktemp("models") / "large.gguf", SHAPE, "q4_0")
    yield path
    path.unlink()


@pytest.fixture
def net(model: Path) -> Iterator[Network]:
    with network("front", *WORKERS) as made:
        for worker in WORKERS:
            made.limit_memory(worker, model.stat().st_size * 4 // 5)
        yield made


def generate(cluster: NetworkCluster, prompt: list[int]) -> list[int]:
    command = [sys.executable, "-c", GENERATE, str(cluster.folder), "large", json.dumps(prompt), str(TOKENS)]
    shown = subprocess.run(cluster.net.command("front", command), stdout=subprocess.PIPE, check=True).stdout
    tokens: list[int] = json.loads(shown)
    return tokens


MOUNT = pytest.param("mount", marks=pytest.mark.skipif(bool(why_not_mounted()), reason=why_not_mounted()))


@pytest.mark.parametrize("way", ["http", MOUNT])
def test_each_reads_its_shard_only_and_together_they_say_what_one_would(
    way: str, model: Path, net: Network, tmp_path: Path
) -> None:
    (store := tmp_path / "store").mkdir()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(network_cluster(net, tmp_path / "cluster"))
        cluster.start("front", "controller")
        cluster.launch("front", "data", "data", "--models", str(store))
        cluster.launch("front", "router")
        for worker in WORKERS:
            net.hide(worker, store)
            cluster.launch(worker, "worker", worker, "--models", way, "--threads", "1")
        cluster.wait()
        cluster.wait_for_workers("front", WORKERS)
        cluster.eldric_cli("front", "models", "add", str(model), "--name", "large")
        if way == "mount":
            stack.enter_context(exported(cluster, "front", store))

        sent = net.sent_bytes("front")
        before = {worker: net.received_bytes(worker) for worker in WORKERS}
        options = ("--stages", "3", "--ctx", "256", "--slots", "1", "--json")
        stages = json.loads(cluster.eldric_cli("front", "deploy", "large", *options))["pipeline"]["stages"]
        assert net.sent_bytes("front") - sent <= model.stat().st_size * 1.02 + EDGES_BYTES * len(WORKERS)
        for stage in stages:
            moved = net.received_bytes(stage["worker"]) - before[stage["worker"]]
            shard = stage["memory"]["mapped"] + stage["memory"]["repacked"]
            assert shard * 0.95 <= moved <= shard * 1.02 + EDGES_BYTES, stage

        prompt = random_prompt(SHAPE.vocab, 20)
        with Chain(model, exact=True) as alone:
            expected, _ = alone.greedy(prompt, TOKENS)
        assert generate(cluster, prompt) == expected
    for worker in WORKERS:
        assert memory_groups.kills(net.memory_group(worker)) == 0
