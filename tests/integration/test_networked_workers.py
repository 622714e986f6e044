"""Three workers on hosts of their own, each with less memory than the model: what a deployment moves, and what it says.

Needs root: the hosts are network namespaces with memory limits (benchmarks/network.py).
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import memory_groups
from benchmarks.network import Network, network, why_not
from benchmarks.network_cluster import NetworkCluster, network_cluster
from benchmarks.shapes import Shape, write_model
from tests.stages import Chain, random_prompt

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

WORKERS = ("worker-1", "worker-2", "worker-3")
SHAPE = Shape(layers=15, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=2048, context=512)
TOKENS = 12

GENERATE = """
import json, sys
from eldric.client import Client, Delta
folder, model, prompt, count = sys.argv[1:]
with Client(folder=folder) as client:
    events = client.generate(model, json.loads(prompt), max_tokens=int(count), temperature=0.0, ignore_eos=True)
    print(json.dumps([token.id for event in events if isinstance(event, Delta) for token in event.tokens]))
"""


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


def test_each_fetches_its_shard_only_and_together_they_say_what_one_would(
    model: Path, net: Network, tmp_path: Path
) -> None:
    with network_cluster(net, tmp_path / "cluster") as cluster:
        cluster.start("front", "controller")
        cluster.launch("front", "data", "data", "--models", str(tmp_path / "store"))
        cluster.launch("front", "router")
        for worker in WORKERS:
            cluster.launch(worker, "worker", worker, "--models", "http", "--threads", "1")
        cluster.wait()
        cluster.wait_for_workers("front", len(WORKERS))
        cluster.eldric_cli("front", "models", "add", str(model), "--name", "large")

        sent = net.sent_bytes("front")
        before = {worker: net.received_bytes(worker) for worker in WORKERS}
        options = ("--stages", "3", "--ctx", "256", "--slots", "1", "--json")
        stages = json.loads(cluster.eldric_cli("front", "deploy", "large", *options))["pipeline"]["stages"]
        assert net.sent_bytes("front") - sent <= model.stat().st_size * 1.02
        for stage in stages:
            moved = net.received_bytes(stage["worker"]) - before[stage["worker"]]
            shard = stage["memory"]["mapped"] + stage["memory"]["repacked"]
            assert shard * 0.95 <= moved <= shard * 1.02, stage

        prompt = random_prompt(SHAPE.vocab, 20)
        with Chain(model, exact=True) as alone:
            expected, _ = alone.greedy(prompt, TOKENS)
        assert generate(cluster, prompt) == expected
    for worker in WORKERS:
        assert memory_groups.kills(net.memory_group(worker)) == 0
