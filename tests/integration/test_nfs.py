"""Stages from a mount of a real NFS server: only their pages travel, and a server that fails or hangs harms little."""

import asyncio
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from eldric.config import NodeConfig
from eldric.data.export import ExportConfig, announced
from eldric.engine.errors import ModelUnreadable
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, shard_of
from eldric.engine.spec import spec_of
from eldric.errors import DeadlineExceeded, NotReady
from eldric.nfs.address import NfsAddress
from eldric.nfs.mountinfo import mounts
from eldric.security import Authority
from eldric.v1 import model_store_pb2, stage_pb2
from eldric.worker import loading
from eldric.worker.config import WorkerConfig
from eldric.worker.loading import StageLoader
from eldric.worker.metrics import WorkerMetrics
from eldric.worker.mounted import mounts as mounts_module
from eldric.worker.mounted import read_ahead, watch
from eldric.worker.mounted.mounts import Mounts
from eldric.worker.mounted.watch import MountWatch
from eldric.worker.range_cache.fetcher import RangeFetcher
from eldric.worker.stages import StageTable
from tests.loads import middle_stage
from tests.models import storyteller
from tests.nfs import Mounted, Server, exporting, free_port, mounted, need_nfs
from tests.replicas import big_model, fetching, filled_store, replica
from tests.rings import TestRing, ring, source_of
from tests.stores import serving

pytestmark = pytest.mark.timeout(60)

LAYERS = 8  # of the big model
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    need_nfs()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data worker's folder: its store in models/ has a model of 26 MB."""
    folder = tmp_path_factory.mktemp("data")
    filled_store(folder, big_model(tmp_path_factory.mktemp("model")))
    return folder


@pytest.fixture(scope="module")
def source(store: Path, tmp_path_factory: pytest.TempPathFactory) -> stage_pb2.ModelSource:
    """What the store says of it, but for its folder, which is not there: as if the store were on another machine."""
    made = filled_store(tmp_path_factory.mktemp("same"), store / "models" / "big" / "big.gguf")
    made.folder = "/nowhere"
    return made


@pytest.fixture
def server(store: Path) -> Iterator[Server]:
    with exporting(store / "models") as server:
        yield server


@pytest.fixture
def mount(server: Server, tmp_path: Path) -> Iterator[Mounted]:
    with mounted(server, tmp_path / "mounts") as mount:
        yield mount


def beside(store: Path, folder: Path) -> Path:
    """The folder of another data worker, over the same store."""
    folder.mkdir()
    (folder / "models").symlink_to(store / "models")
    return folder


def worker(folder: Path, fetcher: RangeFetcher | None = None, **settings: Any) -> tuple[StageTable, Mounts]:
    node = NodeConfig("worker", "test", folder / "worker", controllers=("127.0.0.1:1",))
    config = WorkerConfig(node, threads=1, **settings)
    loader = StageLoader(config, WorkerMetrics(CollectorRegistry()), lambda: None, fetcher)
    return StageTable(config, loader), loader.mounts


def shard_bytes(path: Path, first: int, last: int) -> int:
    with ModelFile.open(path) as model:
        return sum(each.length for each in shard_of(model, spec_of(model), LayerRange(first, last)).ranges)


def nothing(event: stage_pb2.LoadProgress) -> None:
    """Progress that nobody follows."""


async def test_a_worker_mounts_the_export_and_only_the_shards_pages_travel(
    server: Server, store: Path, source: stage_pb2.ModelSource, tmp_path: Path
) -> None:
    table, mounts_of = worker(tmp_path)
    told = stage_pb2.ModelSource()
    told.CopyFrom(source)
    told.exports.append(server.export)
    events: list[stage_pb2.LoadProgress] = []
    try:
        loaded = await table.load(middle_stage(told, 2, 5), events.append)
        shard = shard_bytes(store / "models" / "big" / "big.gguf", 2, 5)
        assert shard > 8 * MIB
        assert shard <= server.sent_bytes() <= 1.02 * shard
        assert (
            events[-1].phase == "mapping"
            and events[-1].done_bytes == events[-1].total_bytes == loaded.memory.mapped_bytes
        )
        sent = server.sent_bytes()
        await table.load(middle_stage(told, 3, 5, "again"), nothing)  # its pages are in the page cache
        assert server.sent_bytes() - sent < 0.02 * shard
        (place,) = [each for each in mounts() if each.source == f"{server.address}#private"]
        assert place.point.startswith(str(tmp_path / "worker" / "mounts"))
    finally:
        await table.close()
        await asyncio.to_thread(mounts_of.close)
    assert all(each.source != f"{server.address}#private" for each in mounts())


async def test_what_was_loaded_from_a_mount_is_locked_in_memory(
    mount: Mounted, source: stage_pb2.ModelSource, tmp_path: Path
) -> None:
    table, _ = worker(tmp_path, models_dir=mount.folder)
    try:
        loaded = await table.load(middle_stage(source, 2, 3), nothing)
        assert loaded.memory.locked_bytes == loaded.memory.mapped_bytes > 0
    finally:
        await table.close()


async def test_what_cannot_be_locked_is_counted_without_what_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "lockable_bytes", lambda: 0)
    (tmp_path / "data").mkdir()
    told = filled_store(tmp_path / "data", storyteller(), "tale")
    with exporting(tmp_path / "data" / "models") as server, mounted(server, tmp_path / "mounts") as mount:
        table, _ = worker(tmp_path, models_dir=mount.folder)
        asked = middle_stage(told, 2, 4)
        asked.options.weights = "auto"
        try:
            with caplog.at_level(logging.WARNING, "eldric.worker.loading"):
                loaded = await table.load(asked, nothing)
            mapped = loaded.memory.mapped_bytes
            assert mapped < 0.05 * shard_bytes(storyteller(), 2, 4), "the matrices were copied"
            said = [each.getMessage() for each in caplog.records if "not_locked" in each.getMessage()]
            assert len(said) == (mapped > 0)
            assert all(f"locked_bytes=0 mapped_bytes={mapped}:" in each for each in said)
        finally:
            await table.close()


async def test_a_stage_from_a_mount_says_what_it_says_from_a_disk(tmp_path: Path) -> None:
    """A whole chat model, in two stages, through ganesha and FUSE."""
    here = tmp_path / "store"
    here.mkdir()
    path = here / "tale.gguf"
    path.write_bytes(storyteller().read_bytes())
    prompt = list(range(5, 25))
    async with ring(path, [3, 3]) as local:
        expected = await local.generate(prompt, 24)
    with exporting(here) as server, mounted(server, tmp_path / "mounts") as mount:
        async with ring(mount.folder / path.name, [3, 3]) as remote:
            assert await remote.generate(prompt, 24) == expected


@pytest.fixture
def slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads no more than a piece ahead of what is used, so that a load is under way for a while."""
    monkeypatch.setattr(read_ahead, "WINDOW_BYTES", MIB)
    monkeypatch.setattr(read_ahead, "_STEP_BYTES", MIB)


async def interrupted_load(
    mount: Mounted, source: stage_pb2.ModelSource, folder: Path, interrupt: Callable[[], None]
) -> tuple[Exception, float]:
    """A load in whose midst something happens: how it ended, and how long after."""
    table, _ = worker(folder, models_dir=mount.folder)
    done: list[float] = []

    def once(event: stage_pb2.LoadProgress) -> None:
        if not done:
            interrupt()
            done.append(time.monotonic())

    try:
        with pytest.raises(Exception) as caught:
            await table.load(middle_stage(source, 1, LAYERS - 1), once)
        return caught.value, time.monotonic() - done[0]
    finally:
        await table.close()


@pytest.mark.usefixtures("slow_reader")
async def test_a_server_that_is_killed_during_a_load_is_an_error(
    server: Server, mount: Mounted, source: stage_pb2.ModelSource, tmp_path: Path
) -> None:
    error, after_s = await interrupted_load(mount, source, tmp_path, server.kill)
    assert isinstance(error, ModelUnreadable) and "cannot be read, after" in str(error)
    assert after_s < 8


@pytest.mark.usefixtures("slow_reader")
async def test_a_mount_that_hangs_during_a_load_is_an_error_once_nothing_moves(
    mount: Mounted, source: stage_pb2.ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself stands still: its reads do not even fail."""
    monkeypatch.setattr(read_ahead.ReadAhead.__init__, "__defaults__", (1.0,))
    error, after_s = await interrupted_load(mount, source, tmp_path, lambda: mount.client.send_signal(signal.SIGSTOP))
    assert isinstance(error, DeadlineExceeded) and "its file server hangs" in str(error)
    assert 0.9 < after_s < 8


@pytest.mark.usefixtures("slow_reader")
async def test_a_load_whose_server_is_killed_goes_on_over_http_where_there_is_a_data_worker(
    server: Server, mount: Mounted, store: Path, source: stage_pb2.ModelSource, tmp_path: Path
) -> None:
    authority = Authority.create("test")
    fetched = fetching(tmp_path / "cache", authority)
    async with replica(beside(store, tmp_path / "data"), authority, "d1") as data:
        told = stage_pb2.ModelSource()
        told.CopyFrom(source)
        told.places.append(data.place)
        table, _ = worker(tmp_path, fetched.fetcher, models_dir=mount.folder)
        phases: list[str] = []

        def follow(event: stage_pb2.LoadProgress) -> None:
            if not phases:
                server.kill()
            phases.append(event.phase)

        try:
            loaded = await table.load(middle_stage(told, 1, LAYERS - 1), follow)
            assert loaded.memory.mapped_bytes > 0 and loaded.memory.locked_bytes == 0
            assert list(dict.fromkeys(phases)) == ["mapping", "fetching"]
        finally:
            await table.close()


async def test_another_file_under_a_mount_is_not_taken_for_the_model(
    mount: Mounted, source: stage_pb2.ModelSource, tmp_path: Path
) -> None:
    other = stage_pb2.ModelSource()
    other.CopyFrom(source)
    other.header_sha256 = b"\1" * 32
    table, _ = worker(tmp_path, models_dir=mount.folder)
    with pytest.raises(NotReady, match="its header differs"):
        await table.load(middle_stage(other, 1, 2), nothing)


async def test_a_hanging_mount_keeps_no_load_waiting(
    mount: Mounted, source: stage_pb2.ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts_module, "LOOK_S", 0.5)
    table, _ = worker(tmp_path, models_dir=mount.folder)
    mount.client.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(NotReady, match="does not answer within"):
        await table.load(middle_stage(source, 1, 2), nothing)
    assert time.monotonic() - began < 5


class Watched:
    """A ring whose stages are mapped from a mount, with the mount watched."""

    def __init__(self, made: TestRing) -> None:
        self.ring = made
        self.changes = asyncio.Event()
        self.registry = CollectorRegistry()
        self.table = made.tables[0]
        self.mounts = self.table._loader.mounts
        self.watch = MountWatch(self.mounts, self.table, self.changes.set, self.registry)

    async def told(self, problem: bool) -> str:
        """What the stage's status says, once it tells of a problem, or of none any more."""
        async with asyncio.timeout(15):
            while bool(message := next(iter(self.table)).status().message) != problem:
                self.changes.clear()
                await self.changes.wait()
        return message

    def answers(self, folder: Path) -> float | None:
        return self.registry.get_sample_value("eldric_mount_answers", {"mount": str(folder)})


@pytest.fixture
async def watched(mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(watch, "INTERVAL_S", 0.2)
    async with ring(mount.folder / "big" / "big.gguf", [4, 4], context=64, chunk=16) as made:
        watching = Watched(made)
        await watching.watch.start()
        try:
            yield watching
        finally:
            await watching.watch.stop()


async def test_a_pipeline_goes_on_while_its_server_is_stopped_and_status_says_so_within_seconds(
    server: Server, mount: Mounted, watched: Watched
) -> None:
    prompt = [3, 4, 5]
    expected = await watched.ring.generate(prompt, 16)
    began = time.monotonic()
    server.signal(signal.SIGSTOP)
    message = await watched.told(True)
    assert time.monotonic() - began < 4
    assert message.startswith(f"the mount {mount.folder} ({server.address}#private) does not answer")
    assert watched.answers(mount.folder) == 0
    assert await watched.ring.generate(prompt, 16) == expected
    server.signal(signal.SIGCONT)
    await watched.told(False)
    assert watched.answers(mount.folder) == 1


async def test_a_pipeline_goes_on_while_its_server_is_gone_and_the_mount_works_again_with_a_new_one(
    server: Server, mount: Mounted, watched: Watched
) -> None:
    server.kill()
    assert f"the mount {mount.folder}" in await watched.told(True)
    assert len(await watched.ring.generate([3, 4, 5], 16)) == 16
    await asyncio.to_thread(server.start)
    await watched.told(False)
    with (mount.folder / "big" / "big.gguf").open("rb") as file:
        assert await asyncio.to_thread(file.read, 4) == b"GGUF"


async def test_a_file_that_is_replaced_on_the_server_ends_its_stages_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FUSE knows files by their names: what is mapped changes with the file, as if that were written to."""
    monkeypatch.setattr(watch, "INTERVAL_S", 0.2)
    here = tmp_path / "store"
    here.mkdir()
    shutil.copyfile(storyteller(), here / "tale.gguf")
    (here / "other").write_bytes(b"another file")
    with exporting(here) as server, mounted(server, tmp_path / "mounts") as mount:
        path = mount.folder / "tale.gguf"
        told = source_of(path)
        async with ring(path, [3, 3], weights="mapped") as made:
            watching = Watched(made)
            await watching.watch.start()
            (held,) = watching.table
            try:
                (here / "other").replace(here / "tale.gguf")
                async with asyncio.timeout(15):
                    await held.gone.wait()
                assert f"{path} was changed in place from {storyteller().stat().st_size} to 12 bytes" in caplog.text
                with pytest.raises(NotReady, match=r"tale\.gguf has 12 bytes here and"):
                    await watching.table.load(middle_stage(told, 2, 4, "again"), nothing)
            finally:
                await watching.watch.stop()


async def test_a_new_load_goes_to_http_at_once_while_the_mount_is_known_to_hang(
    server: Server,
    mount: Mounted,
    watched: Watched,
    store: Path,
    source: stage_pb2.ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = Authority.create("test")
    fetched = fetching(tmp_path / "cache", authority)
    async with replica(beside(store, tmp_path / "data"), authority, "d1") as data:
        told = stage_pb2.ModelSource()
        told.CopyFrom(source)
        told.places.append(data.place)
        server.signal(signal.SIGSTOP)
        await watched.told(True)
        table, known = worker(tmp_path, fetched.fetcher, models_dir=mount.folder)
        known.problems.update(watched.mounts.problems)
        monkeypatch.setattr(mounts_module, "look", lambda *_: pytest.fail("it looked at the mount"))
        try:
            await table.load(middle_stage(told, 2, 5), nothing)
            assert await data.sent_bytes() >= shard_bytes(store / "models" / "big" / "big.gguf", 2, 5)
        finally:
            await table.close()


async def test_a_data_worker_says_where_its_store_is_exported(store: Path) -> None:
    address = NfsAddress("127.0.0.1", "/models", 12049)
    async with serving(store) as data:
        asked = model_store_pb2.ModelRequest(id="big")
        assert not (await data.calls.Metadata(asked)).source.exports
        with announced(ExportConfig(store / "models", address)):
            (export,) = (await data.calls.Metadata(asked)).source.exports
        assert NfsAddress(export.host, export.path, export.port) == address


def run_cli(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "eldric.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_exports_and_mounts_until_it_is_interrupted(store: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "mnt", free_port()
    folder.mkdir()
    exporting = run_cli("data", "export", "--store", str(store / "models"), "--port", str(port), "--json")
    assert exporting.stdout is not None
    told = json.loads(exporting.stdout.readline())
    assert told["export"] == f"nfs://127.0.0.1:{port}/models"
    mounting = run_cli("mount", told["export"], str(folder), "--json")
    assert mounting.stdout is not None
    assert json.loads(mounting.stdout.readline()) == {"export": told["export"], "folder": str(folder)}
    assert (folder / "big" / "big.gguf").stat().st_size == (store / "models" / "big" / "big.gguf").stat().st_size
    with pytest.raises(OSError, match="Read-only"):
        (folder / "big" / "other").touch()
    mounting.send_signal(signal.SIGINT)
    mounting.communicate(timeout=10)
    assert not any(each.point == str(folder) for each in mounts())
    exporting.send_signal(signal.SIGINT)
    exporting.communicate(timeout=15)
    assert exporting.returncode == 130
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
