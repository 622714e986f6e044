"""Which nodes a local cluster has, and what becomes of its folder."""

import datetime
from dataclasses import replace
from pathlib import Path

import pytest

from eldric.cli import certificates
from eldric.cli.folder_lock import locked
from eldric.cli.local import LocalCluster
from eldric.cli.roster import NodeEntry, Shape, roster
from eldric.client.cluster import OPERATOR, Cluster
from eldric.config import NodeConfig
from eldric.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, NotFound
from eldric.names import split_address
from eldric.security import Authority, Identity

FOLDER = Path("/somewhere")


def ignore(line: str) -> None:
    """What nobody reads."""


def test_memory_and_cores_are_shared_evenly() -> None:
    nodes = roster(FOLDER, Shape(workers=3), cores=8)
    assert [node.name for node in nodes] == ["controller", "data", "router", "worker-1", "worker-2", "worker-3"]
    for worker in nodes[3:]:
        assert (worker.option("--memory"), worker.option("--threads")) == ("33.33%", "2")
        assert worker.option("--device") is None
    assert len({node.folder for node in nodes}) == len(nodes)


def test_devices_are_taken_in_turn_and_shared_by_those_who_took_them() -> None:
    workers = roster(FOLDER, Shape(workers=3, device="CUDA0, CUDA1"))[3:]
    assert [worker.option("--device") for worker in workers] == ["CUDA0", "CUDA1", "CUDA0"]
    assert [worker.option("--memory") for worker in workers] == ["50.00%", "100.00%", "50.00%"]


def test_sites_whose_pages_may_call_are_the_routers_business() -> None:
    shape = Shape(allow_origins=("http://localhost:3000", "https://chat.example.org"))
    for node in roster(FOLDER, shape):
        said = [node.arguments[i + 1] for i, each in enumerate(node.arguments) if each == "--allow-origin"]
        assert said == ([*shape.allow_origins] if node.kind == "router" else [])


def test_every_worker_has_a_thread() -> None:
    assert roster(FOLDER, Shape(workers=4), cores=2)[-1].option("--threads") == "1"


def test_pinned_workers_have_cores_of_their_own() -> None:
    nodes = roster(FOLDER, Shape(workers=2, pin=True), cores=4)
    assert [node.option("--cpus") for node in nodes[3:]] == ["0,1", "2,3"]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(allow_origins=("chat.example.org",)),
        Shape(workers=0),
        Shape(workers=65),
        Shape(threads=-1),
        Shape(memory="much"),
        Shape(memory="0%"),
    ],
)
def test_impossible_shapes(shape: Shape) -> None:
    with pytest.raises(InvalidRequest):
        roster(FOLDER, shape)


def test_options_are_replaced_and_added() -> None:
    entry = NodeEntry("controller", "c", ("--http-port", "0", "--host", "::1"))
    changed = entry.with_options({"--http-port": "8880", "--grpc-port": "9880"})
    assert changed.option("--http-port") == "8880"
    assert changed.option("--grpc-port") == "9880"
    assert changed.option("--host") == "::1"
    assert len(changed.arguments) == 6


def test_a_made_cluster_is_found_and_every_node_has_its_certificate(tmp_path: Path) -> None:
    made = LocalCluster.create(tmp_path, Shape(workers=2))
    assert LocalCluster.load(tmp_path) == made
    for entry in made.nodes:
        identity = Identity.load(tmp_path / entry.folder)
        assert (identity.kind, identity.name) == (entry.kind, entry.name)
        NodeConfig(entry.kind, entry.name, tmp_path, controllers=("127.0.0.1:1",))
    assert Identity.load(tmp_path / OPERATOR).kind == "client"
    with pytest.raises(AlreadyExists):
        LocalCluster.create(tmp_path, Shape())


def test_what_is_no_cluster_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="eldric-cli up"):
        LocalCluster.load(tmp_path)
    (tmp_path / "cluster.json").write_text('{"nodes": 3}')
    with pytest.raises(InvalidRequest, match=r"cluster\.json"):
        LocalCluster.load(tmp_path)


def started_once(folder: Path, shape: Shape) -> LocalCluster:
    """As a cluster's file is after its first start."""
    made = LocalCluster.create(folder, shape)
    made.controllers = ["127.0.0.1:1"]
    made.save()
    return made


def test_a_cluster_that_never_came_up_takes_another_shape(tmp_path: Path) -> None:
    LocalCluster.create(tmp_path, Shape(workers=2))
    assert len(LocalCluster.open(tmp_path, Shape(workers=5), {"workers"}).nodes) == 8


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    started_once(tmp_path, Shape(workers=2))
    with pytest.raises(AlreadyExists, match="2 workers"):
        LocalCluster.open(tmp_path, Shape(workers=3), {"workers"})
    assert len(LocalCluster.open(tmp_path, Shape(workers=2), {"workers"}).nodes) == 5
    assert len(LocalCluster.open(tmp_path, Shape(), set()).nodes) == 5


def test_nodes_that_do_not_run_take_over_new_settings(tmp_path: Path) -> None:
    before = started_once(tmp_path, Shape(workers=2, memory="1GB"))
    shape = Shape(router_port=18881, threads=7)
    after = LocalCluster.open(tmp_path, shape, {"router_port"})
    assert after.nodes[2].option("--http-port") == "18881"
    assert after.nodes[3:] == before.nodes[3:]
    after = LocalCluster.open(tmp_path, shape, {"threads"})
    assert after.nodes[3].option("--threads") == "7"
    assert LocalCluster.load(tmp_path).nodes == after.nodes


def test_one_command_at_a_time(tmp_path: Path) -> None:
    said: list[str] = []
    second = locked(tmp_path, said.append, timeout_s=0.05)
    with locked(tmp_path, said.append), pytest.raises(DeadlineExceeded, match="another command"), second:
        pass
    assert len(said) == 1
    with locked(tmp_path, said.append, timeout_s=0.05):
        pass


def test_certificates_are_issued_again_after_two_thirds_of_their_life(tmp_path: Path) -> None:
    authority = Authority.create("test")
    lifetime = datetime.timedelta(days=30)
    identity = authority.issue_identity("worker", "w", lifetime)
    identity.save(tmp_path)
    begin, _ = identity.validity()
    assert not certificates.reissue(authority, tmp_path, begin + lifetime * 0.6)
    assert Identity.load(tmp_path) == identity
    assert certificates.reissue(authority, tmp_path, begin + lifetime * 0.7)
    again = Identity.load(tmp_path)
    assert again != identity
    assert again.node_id == identity.node_id
    assert not certificates.reissue(authority, tmp_path / "nobody", begin)


def test_a_file_of_addresses_is_checked(tmp_path: Path) -> None:
    cluster = Cluster(("127.0.0.1:9880", "[::1]:9880"), tmp_path / OPERATOR)
    cluster.save(tmp_path / "context.json")
    assert Cluster.load(tmp_path / "context.json") == cluster
    assert [split_address(each) for each in cluster.controllers] == [("127.0.0.1", 9880), ("::1", 9880)]
    for text in ("", "[]", '{"controllers": []}', '{"controllers": [1]}', '{"controllers": "x"}'):
        (tmp_path / "context.json").write_text(text)
        with pytest.raises(InvalidRequest, match=r"context\.json"):
            Cluster.load(tmp_path / "context.json")
    assert replace(cluster, folder=tmp_path).folder == tmp_path
