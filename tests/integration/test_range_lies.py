"""Data workers that lie: wrong bytes, wrong lengths, bodies without end. It is noticed, and an honest one is asked."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from eldric.errors import DataLoss, NotReady, Unavailable
from eldric.v1 import stage_pb2
from eldric.worker.range_cache import places as places_module
from tests.replicas import BigStore, Handler, at, bring, fetching, liar
from tests.stores import serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up soon."""
    monkeypatch.setattr(places_module, "UNREACHABLE_S", 0.3)


def corrupt(handler: Handler, start: int, stop: int) -> None:
    handler.begin(start, stop)
    handler.wfile.write(bytes(stop - start))


def endless(handler: Handler, start: int, stop: int) -> None:
    handler.begin(start, stop, 1 << 60)
    while True:
        handler.wfile.write(bytes(1 << 16))


def chunked(handler: Handler, start: int, stop: int) -> None:
    handler.send_response(206)
    handler.send_header("ETag", f'"{handler.etag}"')
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(handler.data)}")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def short(handler: Handler, start: int, stop: int) -> None:
    handler.begin(start, stop)
    handler.wfile.write(handler.data[start : start + (stop - start) // 2])
    handler.close_connection = True


def other_range(handler: Handler, start: int, stop: int) -> None:
    handler.begin(start + 1, stop + 1)
    handler.wfile.write(handler.data[start + 1 : stop + 1])


def whole_file(handler: Handler, start: int, stop: int) -> None:
    handler.send_response(200)
    handler.send_header("ETag", f'"{handler.etag}"')
    handler.send_header("Content-Length", str(len(handler.data)))
    handler.end_headers()
    handler.wfile.write(handler.data)


def other_file(handler: Handler, start: int, stop: int) -> None:
    handler.etag = "0" * 64
    handler.begin(start, stop)
    handler.wfile.write(handler.data[start:stop])


def garbage(handler: Handler, start: int, stop: int) -> None:
    handler.wfile.write(b"SSH-2.0-nothing\r\n\r\n" * 10)
    handler.close_connection = True


LIES = [
    (corrupt, "corrupt"),
    (endless, "wrong_answer"),
    (chunked, "wrong_answer"),
    (short, "unreachable"),
    (other_range, "wrong_answer"),
    (whole_file, "wrong_answer"),
    (other_file, "refused"),
    (garbage, "unreachable"),
]


@pytest.mark.parametrize(("lie", "reason"), LIES, ids=[lie.__name__ for lie, _ in LIES])
async def test_a_lying_data_worker_is_noticed_and_costs_nothing(
    lie: Callable[[Handler, int, int], None],
    reason: str,
    big: BigStore,
    tmp_path: Path,
    quick: None,
) -> None:
    folder, source = big.folder, big.source
    worker = fetching(tmp_path / "cache", big.authority)
    with liar(big.authority, "liar", source, big.path.read_bytes(), lie) as lying:
        async with serving(folder, big.authority, "a") as served:
            honest = stage_pb2.ModelPlace(node_id="data/a", http_url=served.worker.node.http_url)
            await asyncio.to_thread(bring, worker, at(source, lying.place, honest), big.path, (0, 8))
            assert lying.requests and worker.failures("data/liar", reason)
        alone = fetching(tmp_path / "alone", big.authority)
        with pytest.raises((DataLoss, Unavailable, NotReady), match="data/liar"):
            await asyncio.to_thread(bring, alone, at(source, lying.place), big.path, (0, 8))
