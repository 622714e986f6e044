"""A hundred workers ask one data worker at once: it stays up, serves a few at a time, and all get their bytes."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eldric.data.config import DataConfig
from eldric.data.main import DataWorker
from eldric.security import Authority
from eldric.v1 import stage_pb2
from eldric.worker.range_cache import fetch as fetch_module
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.spans import Piece
from tests.models import SmallLlama, write_small_llama
from tests.replicas import fetching, filled_store
from tests.stores import data_config

pytestmark = pytest.mark.timeout(60)

CLIENTS, MOST, MOST_WAITING = 100, 4, 12


@pytest.fixture
def authority() -> Authority:
    return Authority.create("test")


@pytest.fixture
async def narrow(tmp_path: Path, authority: Authority) -> AsyncIterator[tuple[DataWorker, stage_pb2.ModelSource]]:
    """A data worker that sends little at once."""
    path = write_small_llama(tmp_path / "small.gguf", SmallLlama(layers=4))
    source = filled_store(tmp_path, path, "small")
    made = data_config(tmp_path)
    config = DataConfig(made.node, made.folder, transfers=MOST, waiting_transfers=MOST_WAITING)
    worker = DataWorker(config, authority.issue_identity("data", "store"))
    await worker.node.start()
    source.places.add(node_id="data/store", http_url=worker.node.http_url)
    yield worker, source
    await worker.node.stop()


async def test_a_hundred_clients_do_not_take_it_down(
    narrow: tuple[DataWorker, stage_pb2.ModelSource],
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, source = narrow
    monkeypatch.setattr(fetch_module, "CONNECTIONS", 1)
    size = source.files[0].size_bytes
    clients = [fetching(tmp_path / f"cache-{number}", authority, f"w{number}") for number in range(CLIENTS)]
    metrics = worker.node.metrics
    most_running = most_waiting = 0.0

    def bring(number: int) -> None:
        client = clients[number]
        entry = client.cache.open(source)
        pieces = [Piece(0, Extent(at, min(at + 50_000, size))) for at in range(0, size, 50_000)]
        fetch = fetch_module.Fetch(entry, source, client.counts)
        fetch.run(pieces, client.identity.client_context(), lambda done, total: None, lambda: False)
        assert entry.have()[0].covers(Extent(0, size))
        entry.close()

    async def watch() -> None:
        nonlocal most_running, most_waiting
        while True:
            running = metrics.get_sample_value("eldric_data_transfers", {"state": "running"}) or 0.0
            waiting = metrics.get_sample_value("eldric_data_transfers", {"state": "waiting"}) or 0.0
            most_running, most_waiting = max(most_running, running), max(most_waiting, waiting)
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    with ThreadPoolExecutor(CLIENTS) as pool:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(pool, bring, number) for number in range(CLIENTS)))
    watching.cancel()
    busy = sum(client.failures("data/store", "busy") for client in clients)
    assert 1 < most_running <= MOST and 1 < most_waiting <= MOST_WAITING
    assert busy > 0, "it told some to come again"
    sent = metrics.get_sample_value("eldric_data_served_bytes_total", {"call": "content"})
    assert sent == CLIENTS * size
