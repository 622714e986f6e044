"""Data workers that hold the same model, honest ones as processes and liars as threads, and a fetcher for their ranges.

Usage, as a process: python -m tests.replicas FOLDER NAME CONTROLLER
"""

import asyncio
import contextlib
import http.server
import os
import re
import signal
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from eldric import node_file
from eldric.data.convert import model_metadata
from eldric.data.importer import Importer
from eldric.data.main import run
from eldric.data.store import ModelStore
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import ByteRange, LayerRange, shard_of
from eldric.engine.spec import spec_of
from eldric.security import Authority, Identity
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.cache import RangeCache
from eldric.worker.range_cache.fetcher import RangeFetcher
from eldric.worker.range_cache.metrics import FetchMetrics
from tests.models import SmallLlama, write_small_llama
from tests.stores import NOBODY, data_config, ignore, until

#: Of 26 MB in 8 layers, so that a layer is some blocks long.
SHAPE = SmallLlama(layers=8, hidden=384, heads=6, kv_heads=6, head_dim=64, ffn=256, context=256)
MODEL = "big"
BLOCK = 1 << 20


def filled_store(folder: Path, path: Path, model: str = MODEL) -> stage_pb2.ModelSource:
    """A store in folder/models that holds a file, and what it says of it."""
    store = ModelStore(folder / "models")
    store.clean()
    return model_metadata(Importer(store).run(str(path), model, "copy", ignore)).source


def big_model(folder: Path) -> Path:
    return write_small_llama(folder / "big.gguf", SHAPE)


@dataclass(slots=True)
class Replica:
    """A data worker in a process of its own. `folder`: its store is in folder/models."""

    folder: Path
    name: str
    authority: Authority
    process: asyncio.subprocess.Process

    @property
    def document(self) -> dict[str, Any]:
        return dict(node_file.read(self.folder / "node") or {})

    @property
    def place(self) -> stage_pb2.ModelPlace:
        return stage_pb2.ModelPlace(node_id=f"data/{self.name}", http_url=self.document["http_url"])

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)

    async def sent_bytes(self) -> int:
        """Bytes of models that it sent over HTTP, by its own count."""
        tls = self.authority.issue_identity("client", "tester").client_context()
        async with httpx.AsyncClient(verify=tls, base_url=self.document["http_url"], trust_env=False) as client:
            text = (await client.get("/metrics")).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "eldric_data_served_bytes_total" and sample.labels["call"] == "content":
                    return int(sample.value)
        raise AssertionError("there is no such metric")


@contextlib.asynccontextmanager
async def replica(folder: Path, authority: Authority, name: str, controller: str = NOBODY) -> AsyncIterator[Replica]:
    """Serves the store in folder/models until the block ends; by default nobody is its controller."""
    authority.issue_identity("data", name).save(folder / "node")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.replicas", str(folder), name, controller, stderr=asyncio.subprocess.DEVNULL
    )
    made = Replica(folder, name, authority, process)
    try:
        await until((folder / "node" / "node.json").exists)
        yield made
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                made.kill()
        await process.wait()


@dataclass(slots=True)
class Liar:
    """A data worker that answers wrong. `answer` writes the body of a range: (handler, start, stop)."""

    place: stage_pb2.ModelPlace
    requests: list[str] = field(default_factory=list)


Answer = Callable[["Handler", int, int], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request to a liar. `data`: the file's true bytes."""

    protocol_version = "HTTP/1.1"
    data: bytes
    etag: str
    answer: Answer
    liar: Liar

    def do_GET(self) -> None:  # http.server's name
        self.liar.requests.append(self.path)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None or "/content" not in self.path:
            self.refuse(404)
            return
        with contextlib.suppress(OSError, ssl.SSLError):
            type(self).answer(self, int(found[1]), int(found[2]) + 1)

    def refuse(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def begin(self, start: int, stop: int, length: int | None = None) -> None:
        """The head of a true answer, but for a wrong length."""
        self.send_response(206)
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(stop - start if length is None else length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave when they like."""


@contextlib.contextmanager
def liar(authority: Authority, name: str, source: stage_pb2.ModelSource, data: bytes, answer: Answer) -> Iterator[Liar]:
    """A liar that serves until the block ends."""
    tls = authority.issue_identity("data", name).server_context(ssl.CERT_REQUIRED)
    members = {"data": data, "etag": source.files[0].sha256.hex(), "answer": staticmethod(answer)}
    made: type[Handler] = type("LyingHandler", (Handler,), members)
    server = _Server(("127.0.0.1", 0), made)
    server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    url = f"https://127.0.0.1:{server.server_address[1]}"
    made.liar = Liar(stage_pb2.ModelPlace(node_id=f"data/{name}", http_url=url))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made.liar
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True, slots=True)
class Fetching:
    """A worker's fetcher, and what it counts."""

    fetcher: RangeFetcher
    cache: RangeCache
    identity: Identity
    counts: FetchMetrics
    metrics: CollectorRegistry

    def failures(self, source: str, reason: str) -> float:
        labels = {"source": source, "reason": reason}
        return self.metrics.get_sample_value("eldric_fetch_failures_total", labels) or 0.0

    def fetched_bytes(self, source: str) -> float:
        return self.metrics.get_sample_value("eldric_fetched_bytes_total", {"source": source}) or 0.0


def fetching(folder: Path, authority: Authority, name: str = "w1", limit_bytes: int = 0) -> Fetching:
    """The fetcher of a worker, with its cache in `folder`."""
    return fetching_as(folder, authority.issue_identity("worker", name), limit_bytes)


def fetching_as(folder: Path, identity: Identity, limit_bytes: int = 0) -> Fetching:
    """Like `fetching`, with a certificate that is there already."""
    cache, registry = RangeCache(folder, limit_bytes), CollectorRegistry()
    counts = FetchMetrics(registry, cache.nbytes)
    return Fetching(RangeFetcher(cache, lambda: identity, counts), cache, identity, counts, registry)


def at(source: stage_pb2.ModelSource, *places: stage_pb2.ModelPlace) -> stage_pb2.ModelSource:
    made = stage_pb2.ModelSource()
    made.CopyFrom(source)
    made.places.extend(places)
    return made


def ranges_of(path: Path, start: int, stop: int) -> tuple[ByteRange, ...]:
    with ModelFile.open(path) as model:
        return shard_of(model, spec_of(model), LayerRange(start, stop)).ranges


def bring(
    worker: Fetching,
    source: stage_pb2.ModelSource,
    path: Path,
    layers: tuple[int, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:
    """Fetch a stage's ranges; they must be the file's. Returns the last (done, total) that was told."""
    told = (0, 0)

    def note(done: int, total: int) -> None:
        nonlocal told
        told = (done, total)
        progress(done, total)

    model, entry = worker.fetcher.open(source, cancelled)
    try:
        ranges = ranges_of(path, *layers)
        worker.fetcher.fetch(entry, source, ranges, note, cancelled)
        data, copies = path.read_bytes(), [copy.read_bytes() for copy in entry.paths]
        assert copies[0][: model.header_bytes] == data[: model.header_bytes]
        for part in ranges:
            span = slice(part.offset, part.offset + part.length)
            assert copies[part.file][span] == data[span]
    finally:
        model.close()
        entry.close()
    return told


@dataclass(frozen=True, slots=True)
class BigStore:
    """A filled store's folder, the source of its one model, that model's file, and the cluster's authority."""

    folder: Path
    source: stage_pb2.ModelSource
    path: Path
    authority: Authority


if __name__ == "__main__":
    asyncio.run(run(data_config(Path(sys.argv[1]), sys.argv[3], sys.argv[2])))
