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
from benchmarks.network import network, why_not
from benchmarks.network_cluster import NetworkCluster, exported, network_cluster
from benchmarks.shapes import Shape, write_model
from eldric.data.ganesha import INSTALL, PROGRAM
from eldric.nfs.mounting import fuse_problem, kernel_can
from tests.stages import Chain, random_prompt

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

HOSTS = ("one", "two", "three")
WAYS = ("http", "mount")
SHAPE = Shape(layers=15, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=2048, context=512)
PROMPT, TOKENS = random_prompt(SHAPE.vocab, 20), 12

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


MOUNT = pytest.param("mount", marks=pytest.mark.skipif(bool(why_not_mounted()), reason=why_not_mounted()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_model(tmp_path_factory.mktemp("models") / "large.gguf", SHAPE, "q4_0")
    yield path
    path.unlink()


def memory_of(model: Path) -> int:
    """Of a worker's host, in whole pages: less than the model.

    With much less the kernel drops pages of a mount before they are used, and reads them again.
    """
    return model.stat().st_size * 19 // 20 & ~4095


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkCluster]:
    """On each of three hosts a worker for each way, in a memory group of its own. The model is in the store."""
    folder = tmp_path_factory.mktemp("network")
    (store := folder / "store").mkdir()
    with network("front", *HOSTS) as net, network_cluster(net, folder / "cluster") as made:
        made.start("front", "controller")
        made.launch("front", "data", "data", "--models", str(store))
        made.launch("front", "router")
        for host in HOSTS:
            net.hide(host, store)
            for way in WAYS:
                net.limit_memory(host, memory_of(model))
                made.launch(host, "worker", f"{way}-{host}", "--models", way, "--threads", "1")
        made.wait()
        made.wait_for_workers("front", [f"{way}-{host}" for way in WAYS for host in HOSTS])
        made.eldric_cli("front", "models", "add", str(model), "--name", "large")
        yield made


@pytest.fixture(scope="module")
def said(model: Path) -> list[int]:
    """What one stage alone makes of the prompt."""
    with Chain(model, exact=True) as alone:
        return alone.greedy(PROMPT, TOKENS)[0]


def generate(cluster: NetworkCluster) -> list[int]:
    command = [sys.executable, "-c", GENERATE, str(cluster.folder), "large", json.dumps(PROMPT), str(TOKENS)]
    shown = subprocess.run(cluster.net.command("front", command), stdout=subprocess.PIPE, check=True).stdout
    tokens: list[int] = json.loads(shown)
    return tokens


def test_a_worker_offers_what_its_memory_group_allows(cluster: NetworkCluster, model: Path) -> None:
    workers = json.loads(cluster.eldric_cli("front", "workers", "--json"))["workers"]
    assert {worker["memory_bytes"] for worker in workers} == {memory_of(model)}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", MOUNT])
def test_each_reads_its_shard_only_and_together_they_say_what_one_would(
    way: str, cluster: NetworkCluster, model: Path, said: list[int]
) -> None:
    net, store = cluster.net, cluster.folder.parent / "store"
    workers = ",".join(f"{way}-{host}" for host in HOSTS)
    with exported(cluster, "front", store) if way == "mount" else contextlib.nullcontext():
        sent = net.sent_bytes("front")
        before = {host: net.received_bytes(host) for host in HOSTS}
        options = ("--workers", workers, "--ctx", "256", "--slots", "1", "--json")
        stages = json.loads(cluster.eldric_cli("front", "deploy", "large", *options))["pipeline"]["stages"]
        assert net.sent_bytes("front") - sent <= model.stat().st_size * 1.02
        for host, stage in zip(HOSTS, stages, strict=True):
            moved = net.received_bytes(host) - before[host]
            shard = stage["memory"]["mapped"] + stage["memory"]["repacked"]
            assert shard * 0.95 <= moved <= shard * 1.02, stage
        assert generate(cluster) == said
        cluster.eldric_cli("front", "undeploy", "large")
    assert all(memory_groups.kills(group) == 0 for host in HOSTS for group in net.memory_groups(host))
