"""What doctor says of a machine and of a cluster."""

import datetime
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from eldric import PROTOCOL, __version__
from eldric.cli import cluster_checks, machine_checks, machine_facts
from eldric.cli.cluster_checks import StoreView
from eldric.cli.findings import Finding, Level
from eldric.cli.health_words import health_words
from eldric.cli.machine_facts import Disk, Engine, Listener
from eldric.client import LinkInfo, ModelInfo, NodeInfo, PipelineInfo, Plan, StageInfo, Worker

GIB = 1024**3
OK, WARNING, PROBLEM = Level.OK, Level.WARNING, Level.PROBLEM


def levels(findings: Finding | Iterable[Finding]) -> list[Level]:
    """The levels, after a look at the rule that what is not well comes with advice."""
    found = [findings] if isinstance(findings, Finding) else list(findings)
    for each in found:
        assert bool(each.advice) is (each.level is not OK), each
        assert each.message
    return [each.level for each in found]


@pytest.mark.parametrize(("version", "level"), [((3, 10, 12), PROBLEM), ((3, 11, 0), OK), ((3, 14, 1), OK)])
def test_python(version: tuple[int, int, int], level: Level) -> None:
    assert levels(machine_checks.check_python(version)) == [level]


@pytest.mark.parametrize(
    ("installed", "wanted", "level"),
    [
        ("1.80.0", "1.80", OK),
        ("1.9", "1.80", PROBLEM),
        ("2.0rc1", "1.80", OK),
        (None, "1", PROBLEM),
        ("odd", "0", PROBLEM),
    ],
)
def test_packages(installed: str | None, wanted: str, level: Level) -> None:
    found = machine_checks.check_packages({"grpcio": (installed, wanted), "fine": ("1", "1")})
    assert levels(found) == [level]
    assert level is OK or "grpcio" in found.message


def test_the_packages_of_this_machine_are_read() -> None:
    found = machine_facts.packages()
    assert levels(machine_checks.check_packages(found)) == [OK]
    if found:
        assert found["grpcio"][1] == "1.80"
        assert "pytest" not in found


@pytest.mark.parametrize(
    ("engine", "level"),
    [
        (Engine("0.26.0", "zen4", ("AMD EPYC",), GIB), OK),
        (Engine("0.26.0", "", ("AMD EPYC", "NVIDIA H100"), GIB), OK),
        (Engine("0.26.0", "sse42", ("Old",), GIB), WARNING),
        ("no usable ggml: it is not installed", PROBLEM),
    ],
)
def test_engine(engine: Engine | str, level: Level) -> None:
    assert levels(machine_checks.check_engine(engine)) == [level]


def test_the_engine_of_this_machine_is_found() -> None:
    found = machine_facts.engine()
    assert isinstance(found, Engine)
    assert found.memory_bytes > 0
    assert found.devices


def test_an_engine_that_is_missing_is_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELDRIC_GGML_DIR", str(tmp_path))
    assert "holds no" in str(machine_facts.engine())


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [(64, 32, OK), (64, 2, WARNING), (8, 0.5, WARNING), (64, 0.1, PROBLEM), (1, 0.9, WARNING), (2, 1.5, OK)],
)
def test_memory(total: float, free: float, level: Level) -> None:
    assert levels(machine_checks.check_memory(int(total * GIB), int(free * GIB))) == [level]


def test_workers_that_offer_more_than_there_is() -> None:
    assert levels(machine_checks.check_promises(2 * GIB, GIB)) == [WARNING]
    assert levels(machine_checks.check_promises(GIB, GIB)) == [OK]


@pytest.mark.parametrize(("free", "level"), [(100, OK), (1, WARNING), (0.1, PROBLEM)])
def test_disk(free: float, level: Level) -> None:
    assert levels(machine_checks.check_disk(Disk(Path("x"), int(free * GIB), 200 * GIB))) == [level]


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine_facts.disk(tmp_path / "a" / "b").total_bytes > 0


@pytest.mark.parametrize(("limit", "level"), [(None, OK), (65536, OK), (1024, WARNING), (100, PROBLEM)])
def test_open_files(limit: int | None, level: Level) -> None:
    assert levels(machine_checks.check_open_files(limit)) == [level]


@pytest.mark.parametrize(("limit", "level"), [(None, OK), (8 * 1024**2, OK), (0, WARNING)])
def test_locked_memory(limit: int | None, level: Level) -> None:
    assert levels(machine_checks.check_locked_memory(limit)) == [level]


def test_ports() -> None:
    taken = [Listener(8880, "controller, HTTP", 7, "apache2"), Listener(8890, "worker, HTTP")]
    found = machine_checks.check_ports(taken, [7])
    assert levels(found) == [WARNING]
    assert "8890" in found.message
    assert "8880" not in found.message
    assert levels(machine_checks.check_ports(taken[:1], [7])) == [OK]
    assert levels(machine_checks.check_ports([], [])) == [OK]


def test_default_ports_do_not_collide() -> None:
    assert len(machine_facts.default_ports()) == 9


@pytest.mark.parametrize(
    ("skews", "expected"),
    [({}, []), ({"a": 0.9, "b": -1.0}, [OK]), ({"a": 0.0, "b": -10.0}, [WARNING]), ({"a": 100.0, "b": 5.0}, [PROBLEM])],
)
def test_clock(skews: dict[str, float], expected: list[Level]) -> None:
    assert levels(machine_checks.check_clock(skews)) == expected


def test_a_clock_that_is_behind() -> None:
    (found,) = machine_checks.check_clock({"worker w": -10.0, "data d": 2.0})
    assert found.message == "this clock is 10 s behind that of worker w"


def node(
    kind: str, name: str = "", state: str = "up", protocol: int = PROTOCOL, version: str = __version__
) -> NodeInfo:
    return NodeInfo(name or kind, kind, state, 1, "h:1", "https://h:2", version, protocol)


CLUSTER = [node("controller"), node("data"), node("router"), node("worker", "w1"), node("worker", "w2")]


def test_controllers() -> None:
    found = list(cluster_checks.check_controllers({"a:1": "", "b:1": "refused"}))
    assert levels(found) == [OK, PROBLEM]
    assert "refused" in found[1].message


def test_local_nodes() -> None:
    assert levels(cluster_checks.check_local_nodes({}, 5, Path("x"))) == [OK]
    assert levels(cluster_checks.check_local_nodes(dict.fromkeys("abcde", ""), 5, Path("x"))) == [PROBLEM]
    found = cluster_checks.check_local_nodes({"worker-1": "Segmentation fault"}, 5, Path("x"))
    assert levels(found) == [PROBLEM]
    assert found.message == "not running: worker-1 (Segmentation fault)"


def test_nodes() -> None:
    assert levels(cluster_checks.check_nodes(CLUSTER)) == [OK]
    lost = [*CLUSTER[:4], node("worker", "w2", "lost")]
    assert levels(cluster_checks.check_nodes(lost)) == [PROBLEM]
    draining = [*CLUSTER[:4], node("worker", "w2", "draining")]
    assert levels(cluster_checks.check_nodes(draining)) == [WARNING]


@pytest.mark.parametrize("kind", ["controller", "data", "router"])
def test_a_kind_that_is_missing(kind: str) -> None:
    found = list(cluster_checks.check_nodes([each for each in CLUSTER if each.kind != kind]))
    assert levels(found) == [PROBLEM]
    assert f"eldric-cli {kind}" in found[0].advice


def test_versions() -> None:
    assert levels(cluster_checks.check_versions(CLUSTER)) == [OK]
    found = cluster_checks.check_versions([*CLUSTER, node("worker", "old", protocol=PROTOCOL + 1)])
    assert levels(found) == [PROBLEM]
    assert f"worker old speaks {PROTOCOL + 1}" in found.message
    assert levels(cluster_checks.check_versions([*CLUSTER, node("worker", "old", version="0.0.9")])) == [WARNING]


STAGES = tuple(
    StageInfo(index, f"w{index + 1}", 1, (index, index + 1), "serving", 1, {}, 1.0, 1, "zmq", True, "")
    for index in range(2)
)
PIPELINE = PipelineInfo("tale", "id", "tale", "ready", 1, STAGES, 512, 4, 0, 0, 1.0, "", {})
WORKERS = [
    Worker(
        name=f"w{number}",
        pid=1,
        state="up",
        device="CPU",
        devices=("CPU (a processor)",),
        memory_bytes=GIB,
        memory_used_bytes=5,
        cores=1,
        engine="ggml 0.26.0 zen4",
        address="h:1",
    )
    for number in (1, 2)
]


def test_pipelines() -> None:
    assert levels(cluster_checks.check_pipelines([])) == []
    assert levels(cluster_checks.check_pipelines([PIPELINE])) == [OK]
    silent = replace(PIPELINE, stages=(replace(STAGES[0], message="the mount /mnt/m does not answer"),))
    (warned, _) = cluster_checks.check_pipelines([silent])
    assert warned.level is WARNING and "stage 0 of tale on w1: the mount /mnt/m" in warned.message
    degraded = replace(PIPELINE, state="degraded", message="worker w2 is lost")
    found = list(cluster_checks.check_pipelines([PIPELINE, degraded]))
    assert levels(found) == [PROBLEM]
    assert "w2" in found[0].message
    plain = replace(PIPELINE, stages=tuple(replace(stage, encrypted=False) for stage in STAGES))
    assert levels(cluster_checks.check_pipelines([plain]))[0] is WARNING


@pytest.mark.parametrize(
    ("encryption", "fallback", "level"),
    [("curve", "", OK), ("host", "", OK), ("none", "", WARNING), ("curve", "ucx failed: no such device", WARNING)],
)
def test_links_of_pipelines(encryption: str, fallback: str, level: Level) -> None:
    link = LinkInfo(1, "zmq", encryption, 0.1, 1, 1, 0, 0, fallback, "")
    linked = replace(PIPELINE, stages=tuple(replace(stage, encrypted=False, link=link) for stage in STAGES))
    assert levels(cluster_checks.check_pipelines([linked]))[0] is level


def test_engines_that_differ_within_a_pipeline() -> None:
    assert levels(cluster_checks.check_engines(WORKERS, [PIPELINE])) == []
    other = [WORKERS[0], replace(WORKERS[1], engine="ggml 0.26.0 haswell")]
    assert levels(cluster_checks.check_engines(other, [PIPELINE])) == [WARNING]
    assert levels(cluster_checks.check_engines(other, [])) == []


def test_a_worker_over_its_memory() -> None:
    assert levels(cluster_checks.check_memory_of(WORKERS)) == []
    assert levels(cluster_checks.check_memory_of([replace(WORKERS[0], memory_used_bytes=2 * GIB)])) == [WARNING]


def test_plans() -> None:
    assert levels(cluster_checks.check_plans({"tale": Plan("tale", (), {})})) == []
    excluded = {"w2": "draining", "w3": "not needed"}
    found = list(cluster_checks.check_plans({"tale": Plan("tale", (), excluded), "big": "12 GiB are missing"}))
    assert levels(found) == [WARNING, WARNING]
    assert "big cannot be deployed: 12 GiB are missing" in found[0].message
    assert "w2 is left out: draining" in found[1].message


def test_health() -> None:
    assert levels(cluster_checks.check_health({"worker w1": "", "data data": ""})) == [OK]
    assert levels(cluster_checks.check_health({"worker w1": "", "data data": "not ready"})) == [WARNING]
    assert levels(cluster_checks.check_health({})) == []


@pytest.mark.parametrize(
    ("seen", "expected"),
    [({"a": 3, "b": 4}, [OK]), ({"a": 3, "b": None}, [WARNING]), ({}, [WARNING]), ({"a": 3, "b": 5}, [PROBLEM])],
)
def test_model_store(seen: dict[str, int | None], expected: list[Level]) -> None:
    view = StoreView("store", (("a", 3), ("b", 4)), seen)
    assert levels(cluster_checks.check_stores({"m": view})) == expected


def test_a_store_on_a_mount_that_hangs_is_said_once_and_names_its_models() -> None:
    view = StoreView("/mnt/m", (("a", 3),), "/mnt/m is on the mount /mnt, which does not answer")
    (found,) = cluster_checks.check_stores({"tale": view, "smol": view})
    assert found.level is PROBLEM
    assert found.message == "tale, smol: /mnt/m is on the mount /mnt, which does not answer"


def test_models_that_are_wrong_in_different_ways_are_told_apart() -> None:
    views = {name: StoreView("store", ((f"{name}.gguf", 3),), {f"{name}.gguf": 4}) for name in ("tale", "smol")}
    assert [found.message.partition(" in ")[0] for found in cluster_checks.check_stores(views)] == [
        "tale: tale.gguf",
        "smol: smol.gguf",
    ]


def test_each_model_that_cannot_be_used_is_named() -> None:
    damaged = ModelInfo("tale", 0, 5, "gguf", "", "", 0, 0, "tale: tale/tale.gguf is damaged")
    unknown = ModelInfo("snake", 4, 5, "gguf", "mamba", "F16", 1, 1, "architecture 'mamba' is not supported")
    found = list(cluster_checks.check_models([damaged, unknown]))
    assert levels(found) == [PROBLEM, WARNING]
    assert found[0].message == "tale cannot be used: tale/tale.gguf is damaged"
    assert "`eldric-cli models rm tale`" in found[0].advice
    assert found[1].message == "snake cannot be deployed: architecture 'mamba' is not supported"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            '{"status": "not ready", "synchronised": true, "registered": true, "pipelines": '
            '[{"name": "a", "state": "degraded", "progress": 1.0}, {"name": "b", "state": "ready"}]}',
            "a is degraded",
        ),
        (
            '{"status": "not ready", "problem": "the store is gone", "registered": false}',
            "the store is gone, no controller takes it",
        ),
        ('{"status": "draining"}', "it is about to end"),
        ('{"status": "not ready", "synchronised": false}', "it has not heard of the pipelines yet"),
        ('{"status": "not ready"}', "not ready"),
        ("<html>\nBad gateway", "<html>"),
        ("[1]", "[1]"),
        ('{"status": "x", "pipelines": [1]}', '{"status": "x", "pipelines": [1]}'),
    ],
)
def test_what_health_says_is_told_in_words(body: str, words: str) -> None:
    assert health_words(body) == words


def test_certificates() -> None:
    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)

    def certificate(age_days: float, left_days: float) -> tuple[datetime.datetime, datetime.datetime]:
        return now - datetime.timedelta(days=age_days), now + datetime.timedelta(days=left_days)

    def of(age_days: float, left_days: float) -> list[Level]:
        return levels(cluster_checks.check_certificates({"worker w1": certificate(age_days, left_days)}, now))

    assert of(1, 29) == [OK]
    assert of(25, 5) == [WARNING]
    assert of(31, -1) == [PROBLEM]
    assert of(-1, 31) == [PROBLEM]
    assert levels(cluster_checks.check_certificates({}, now)) == []
