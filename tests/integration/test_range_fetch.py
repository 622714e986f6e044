"""Byte ranges come from real data workers over mutual TLS: exactly what is missing, whoever dies or lies meanwhile."""

import asyncio
import errno
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from eldric.engine.errors import LoadCancelled
from eldric.engine.shard import LayerRange, shard_of
from eldric.engine.spec import spec_of
from eldric.errors import DataLoss, InvalidRequest, NotEnoughSpace, NotReady, Unavailable
from eldric.security import Authority
from eldric.v1 import stage_pb2
from eldric.worker.range_cache import places as places_module
from eldric.worker.range_cache import spans as spans_module
from eldric.worker.range_cache import work as work_module
from eldric.worker.range_cache.cache import RangeCache
from eldric.worker.range_cache.connection import Connection
from eldric.worker.range_cache.extents import Extent
from tests.models import SmallLlama, write_small_llama
from tests.replicas import BLOCK, MODEL, BigStore, Handler, at, bring, fetching, filled_store, liar, ranges_of, replica
from tests.stores import serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up soon."""
    monkeypatch.setattr(places_module, "UNREACHABLE_S", 0.3)


async def test_a_shard_is_fetched_once_and_another_split_fetches_what_is_new(big: BigStore, tmp_path: Path) -> None:
    folder, source = big.folder, big.source
    worker = fetching(tmp_path / "cache", big.authority)
    async with serving(folder, big.authority, "a") as served:
        place = stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url)
        done, total = await asyncio.to_thread(bring, worker, at(source, place), big.path, (2, 4))
        shard = sum(part.length for part in ranges_of(big.path, 2, 4))
        assert shard <= done == total <= 1.02 * shard
        header = source.files[0].header_bytes
        assert shard + header <= worker.fetched_bytes("data/a") <= 1.02 * shard + header
        assert await asyncio.to_thread(bring, worker, at(source, place), big.path, (2, 4)) == (0, 0)
        before = worker.fetched_bytes("data/a")
        await asyncio.to_thread(bring, worker, at(source, place), big.path, (3, 6))
        new = sum(part.length for part in ranges_of(big.path, 4, 6))
        assert worker.fetched_bytes("data/a") - before <= 1.02 * new
    assert await asyncio.to_thread(bring, worker, source, big.path, (2, 6)) == (0, 0), "a warm cache asks nobody"


async def test_a_fetch_tells_its_beginning_before_anything_came(big: BigStore, tmp_path: Path) -> None:
    """What is mapped meanwhile is not told as if nothing were to be fetched."""
    told: list[tuple[int, int]] = []
    async with serving(big.folder, big.authority, "a") as served:
        source = at(big.source, stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url))
        worker = fetching(tmp_path / "cache", big.authority)
        await asyncio.to_thread(bring, worker, source, big.path, (2, 4), lambda done, total: told.append((done, total)))
    assert told[0] == (0, told[-1][1]) and told[-1][0] == told[-1][1] > 0


async def test_an_edge_that_came_wrong_is_noticed_and_mended_when_its_block_is_complete(
    big: BigStore, tmp_path: Path
) -> None:
    """A shard's edges may come without a sum of their own."""
    worker = fetching(tmp_path / "cache", big.authority)
    async with serving(big.folder, big.authority, "a") as served:
        source = at(big.source, stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url))
        await asyncio.to_thread(bring, worker, source, big.path, (2, 4))
        entry = worker.cache.open(source)
        edges = [extent.stop - 1 for extent in entry.have()[0] if extent.stop % BLOCK]
        for edge in edges:
            byte = entry.read(0, Extent(edge, edge + 1))
            entry.write(0, edge, memoryview(bytes([byte[0] ^ 1])))
        entry.close()
        assert edges
        if big.source.files[0].header_bytes - 1 in edges:  # the header's sum is looked at when it is opened
            with pytest.raises(NotReady, match="the cached header of 'big' differs"):
                await asyncio.to_thread(worker.fetcher.open, source, lambda: False)
        await asyncio.to_thread(bring, worker, source, big.path, (0, 8))


async def test_a_split_set_comes_in_parts(big: BigStore, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(layers=4), split_tensors=12)
    source = filled_store(tmp_path / "a", first, "parts")
    assert len(source.files) > 2 and all(file.header_bytes and file.blocks_sha256 for file in source.files)
    worker = fetching(tmp_path / "cache", big.authority)
    async with serving(tmp_path / "a", big.authority, "a") as served:
        place = stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url)
        model, entry = await asyncio.to_thread(worker.fetcher.open, at(source, place), lambda: False)
        ranges = shard_of(model, spec_of(model), LayerRange(1, 3)).ranges
        fetch = worker.fetcher.fetch
        await asyncio.to_thread(fetch, entry, at(source, place), ranges, lambda a, b: None, lambda: False)
        for part in ranges:
            span = slice(part.offset, part.offset + part.length)
            true = (first.parent / Path(source.files[part.file].path).name).read_bytes()
            assert entry.paths[part.file].read_bytes()[span] == true[span]
        model.close()
        entry.close()


async def test_a_data_worker_that_is_killed_midway_is_replaced_by_the_other(
    big: BigStore,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans_module, "SPAN_BYTES", BLOCK)
    source = big.source
    for name in ("a", "b"):
        filled_store(tmp_path / name, big.path)
    worker = fetching(tmp_path / "cache", big.authority)
    async with replica(tmp_path / "a", big.authority, "a") as one, replica(tmp_path / "b", big.authority, "b") as other:
        killed_at: list[tuple[int, int]] = []

        def kill(done: int, total: int) -> None:
            if not killed_at and worker.fetched_bytes("data/a") > BLOCK:
                one.kill()
                killed_at.append((done, total))

        await asyncio.to_thread(bring, worker, at(source, one.place, other.place), big.path, (0, 8), kill)
    assert killed_at and killed_at[0][0] < killed_at[0][1], "it was killed midway"
    assert worker.failures("data/a", "unreachable") and not worker.failures("data/b", "unreachable")
    assert worker.fetched_bytes("data/a") and worker.fetched_bytes("data/b")


async def test_a_corrupted_block_is_named_and_fetched_elsewhere(
    big: BigStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, source = big.folder, big.source
    filled_store(tmp_path / "b", big.path)
    rotten = tmp_path / "b" / "models" / source.files[0].path
    data = bytearray(rotten.read_bytes())
    data[7 * BLOCK + 5] ^= 1
    rotten.unlink()
    rotten.write_bytes(data)
    worker = fetching(tmp_path / "cache", big.authority)
    async with serving(folder, big.authority, "a") as good, serving(tmp_path / "b", big.authority, "b") as bad:
        places = [
            stage_pb2.ModelPlace(node_id=f"data/{name}", http_url=served.worker.node.http_url)
            for name, served in (("b", bad), ("a", good))
        ]
        alone = fetching(tmp_path / "other", big.authority)
        with pytest.raises(DataLoss, match=r"block 7 of big/big\.gguf is damaged on data/b"):
            await asyncio.to_thread(bring, alone, at(source, places[0]), big.path, (0, 8))
        assert alone.failures("data/b", "corrupt") == 1
        assert any("corrupt_block source=data/b" in r.message and "block 7" in r.message for r in caplog.records)
        # What came before stays; the rest, and the block, come from the other one.
        kept = alone.fetched_bytes("data/b")
        await asyncio.to_thread(bring, alone, at(source, *places), big.path, (0, 8))
        assert alone.fetched_bytes("data/a") + alone.fetched_bytes("data/b") <= 1.02 * source.files[0].size_bytes
        assert kept
        await asyncio.to_thread(bring, worker, at(source, *places), big.path, (0, 8))


async def test_block_sums_that_are_not_those_of_the_plan_are_refused(big: BigStore, tmp_path: Path) -> None:
    folder, source = big.folder, big.source
    lied = at(source)
    lied.files[0].blocks_sha256 = hashlib.sha256(b"other sums").digest()
    async with serving(folder, big.authority, "a") as served:
        lied.places.add(node_id="data/a", http_url=served.worker.node.http_url)
        with pytest.raises(DataLoss, match=r"block sums of big/big\.gguf are not those of the model that was planned"):
            await asyncio.to_thread(bring, fetching(tmp_path, big.authority), lied, big.path, (2, 4))


async def test_a_data_worker_that_stands_still_holds_nobody_up(
    big: BigStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another one gives what it owes, long before it counts as dead."""
    monkeypatch.setattr(work_module, "STALLED_S", 0.3)
    filled_store(tmp_path / "a", big.path)
    source = big.source
    worker = fetching(tmp_path / "cache", big.authority)
    stalled = False

    def stall(done: int, total: int) -> None:
        nonlocal stalled
        if not stalled and worker.fetched_bytes("data/a") > BLOCK:
            frozen.process.send_signal(signal.SIGSTOP)
            stalled = True

    folder = big.folder
    async with replica(tmp_path / "a", big.authority, "a") as frozen, serving(folder, big.authority, "b") as served:
        other = stage_pb2.ModelPlace(node_id="data/b", http_url=served.worker.node.http_url)
        began = time.monotonic()
        await asyncio.to_thread(bring, worker, at(source, frozen.place, other), big.path, (0, 8), stall)
        assert stalled and time.monotonic() - began < 8
    assert not worker.failures("data/a", "unreachable")


async def test_a_busy_data_worker_is_asked_again_when_it_says(big: BigStore, tmp_path: Path) -> None:
    times: list[float] = []

    def busy(handler: Handler, start: int, stop: int) -> None:
        times.append(time.monotonic())
        if len(times) <= 1:
            handler.refuse(503, Retry_After="1")
            return
        handler.begin(start, stop)
        handler.wfile.write(handler.data[start:stop])

    source = big.source
    with liar(big.authority, "busy", source, big.path.read_bytes(), busy) as server:
        plain = at(source, server.place)
        for file in plain.files:
            file.blocks_sha256 = b""  # this one serves content alone
        worker = fetching(tmp_path, big.authority)
        await asyncio.to_thread(bring, worker, plain, big.path, (2, 4))
    assert worker.failures("data/busy", "busy") >= 1
    assert times[1] - times[0] >= 1.0


async def test_cancelling_ends_a_fetch_that_stands_still_and_what_came_stays(big: BigStore, tmp_path: Path) -> None:
    stuck, release = threading.Event(), threading.Event()

    def stall(handler: Handler, start: int, stop: int) -> None:
        handler.begin(start, stop)
        half = start + (stop - start) // 2
        handler.wfile.write(handler.data[start : stop if stop <= 10 * BLOCK else half])
        if stop > 10 * BLOCK:
            stuck.set()
            release.wait(20)

    source = big.source
    header = source.files[0].header_bytes
    worker = fetching(tmp_path, big.authority)
    with liar(big.authority, "slow", source, big.path.read_bytes(), stall) as server:
        plain = at(source, server.place)
        plain.files[0].blocks_sha256 = b""
        began = time.monotonic()
        with pytest.raises(LoadCancelled, match="bytes were fetched"):
            await asyncio.to_thread(
                bring,
                worker,
                plain,
                big.path,
                (0, 8),
                cancelled=lambda: stuck.is_set() and began + 1 < time.monotonic(),
            )
        assert time.monotonic() - began < 5
        release.set()
    again = worker.cache.open(source)
    assert again.have()[0].covers(Extent(0, header)) and again.have()[0].nbytes > 5 * BLOCK
    again.close()


_WORKER = """
import sys
from pathlib import Path
from eldric.security import Identity
from eldric.v1 import stage_pb2
from eldric.worker.range_cache import fetch
from tests.replicas import bring, fetching_as
fetch.NOTE_S = 0.05
source = stage_pb2.ModelSource.FromString(bytes.fromhex(sys.argv[3]))
worker = fetching_as(Path(sys.argv[1]), Identity.load(Path(sys.argv[2])))
bring(worker, source, Path(sys.argv[4]), (0, 8))
"""


async def test_cancelling_ends_a_fetch_from_one_who_takes_connections_and_says_nothing(
    big: BigStore, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        source = at(big.source, stage_pb2.ModelPlace(node_id="data/a", http_url=url))
        began = time.monotonic()
        with pytest.raises(LoadCancelled):
            late = lambda: time.monotonic() > began + 0.5  # noqa: E731
            worker = fetching(tmp_path, big.authority)
            await asyncio.to_thread(bring, worker, source, big.path, (0, 8), cancelled=late)
        assert time.monotonic() - began < 5


async def test_a_killed_worker_goes_on_where_it_was(big: BigStore, tmp_path: Path) -> None:
    def slow(handler: Handler, start: int, stop: int) -> None:
        handler.begin(start, stop)
        time.sleep(0.15)
        handler.wfile.write(handler.data[start:stop])

    source = big.source
    big.authority.issue_identity("worker", "w1").save(tmp_path / "w1")
    size = source.files[0].size_bytes
    cache = RangeCache(tmp_path / "cache")
    with liar(big.authority, "slow", source, big.path.read_bytes(), slow) as server:
        plain = at(source, server.place)
        plain.files[0].blocks_sha256 = b""  # this one serves content alone
        arguments = str(cache.folder), str(tmp_path / "w1"), plain.SerializeToString().hex(), str(big.path)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKER, *arguments)
        while not (noted := _noted(cache, plain)) > 3 * BLOCK:
            assert process.returncode is None
            await asyncio.sleep(0.02)
        process.kill()
        await process.wait()
        noted = _noted(cache, plain)
        assert 3 * BLOCK < noted < 0.9 * size, "it was killed midway"
        worker = fetching(cache.folder, big.authority)
        await asyncio.to_thread(bring, worker, plain, big.path, (0, 8))
        assert worker.fetched_bytes("data/slow") <= 1.01 * (size - noted)


def _noted(cache: RangeCache, source: stage_pb2.ModelSource) -> int:
    entry = cache.open(source)
    try:
        return entry.have()[0].nbytes
    finally:
        entry.close()


async def test_a_disk_that_is_full_ends_the_fetch_with_that_error(
    big: BigStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, source = big.folder, big.source
    worker, write = fetching(tmp_path, big.authority), os.pwrite

    def until_full(fd: int, data: memoryview, offset: int) -> int:
        if offset > 10 * BLOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    async with serving(folder, big.authority, "a") as served:
        place = stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", until_full)
            with pytest.raises(NotEnoughSpace, match="is full: make room"):
                await asyncio.to_thread(bring, worker, at(source, place), big.path, (0, 8))
        before = worker.fetched_bytes("data/a")
        await asyncio.to_thread(bring, worker, at(source, place), big.path, (0, 8))  # there is room again
        assert worker.fetched_bytes("data/a") - before < source.files[0].size_bytes
        small = fetching(tmp_path / "small", big.authority, limit_bytes=4 * BLOCK)
        with pytest.raises(NotEnoughSpace, match="--cache-bytes"):
            await asyncio.to_thread(bring, small, at(source, place), big.path, (0, 8))


async def test_two_workers_of_a_machine_fetch_a_model_once(big: BigStore, tmp_path: Path) -> None:
    folder, source = big.folder, big.source
    workers = [fetching(tmp_path, big.authority, name) for name in ("w1", "w2")]
    async with serving(folder, big.authority, "a") as served:
        place = stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url)
        await asyncio.gather(
            *(asyncio.to_thread(bring, worker, at(source, place), big.path, (0, 8)) for worker in workers)
        )
    fetched = sum(worker.fetched_bytes("data/a") for worker in workers)
    assert fetched <= 1.01 * source.files[0].size_bytes


async def test_only_this_very_data_worker_of_this_cluster_is_believed(
    big: BigStore, tmp_path: Path, quick: None
) -> None:
    folder, source = big.folder, big.source
    async with serving(folder, big.authority, "a") as served:
        url = served.worker.node.http_url
        wrong_name = at(source, stage_pb2.ModelPlace(node_id="data/b", http_url=url))
        with pytest.raises(NotReady, match="its certificate is not that of this data worker"):
            await asyncio.to_thread(bring, fetching(tmp_path / "1", big.authority), wrong_name, big.path, (0, 8))
        stranger = fetching(tmp_path / "2", Authority.create("other"))
        with pytest.raises(NotReady, match="its certificate is not that of this data worker"):
            await asyncio.to_thread(
                bring, stranger, at(source, stage_pb2.ModelPlace(node_id="data/a", http_url=url)), big.path, (0, 8)
            )


@pytest.mark.parametrize(
    ("node_id", "url"),
    [
        ("data/a", "http://127.0.0.1:8892"),
        ("data/a", "https://127.0.0.1"),
        ("data/a", "https://:1"),
        ("data/a", "https://h:99999"),
        ("data/a", "file:///etc/passwd"),
        ("worker/a", "https://127.0.0.1:1"),
        ("data/", "https://127.0.0.1:1"),
        ("", ""),
    ],
)
def test_a_place_that_is_no_data_worker_behind_tls_is_refused(node_id: str, url: str, big: BigStore) -> None:
    tls = big.authority.issue_identity("worker", "w1").client_context()
    with pytest.raises(InvalidRequest, match="no data worker with an https address"):
        Connection(stage_pb2.ModelPlace(node_id=node_id, http_url=url), tls)


def test_a_model_without_a_place_cannot_be_fetched(big: BigStore, tmp_path: Path) -> None:
    source = big.source
    with pytest.raises(Unavailable, match=f"no data worker gives '{MODEL}': none holds it"):
        bring(fetching(tmp_path, big.authority), source, big.path, (0, 8))
