"""Models from another data worker, honest or lying."""

import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from eldric.data.checksums import BLOCK_BYTES
from eldric.data.http_client import Hangup
from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.peer import Peers
from eldric.data.puller import Puller, Resolved
from eldric.data.store import ModelStore
from eldric.errors import DataLoss, NotFound, NotReady, Unavailable
from eldric.security import Authority
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import Served, ignore, serving

pytestmark = pytest.mark.usefixtures("calm")

DATA = storyteller().read_bytes()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "there") as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "here")


def pull_from(authority: Authority, store: ModelStore, address: str, model: str = "tale") -> Resolved:
    identity = authority.issue_identity("data", "here")
    puller = Puller(store, Importer(store), Hub(), Peers(lambda: identity), None)
    resolved: list[Resolved] = []
    puller.run(f"eldric://{address}/{model}", "", "", ignore, resolved.append, Hangup())
    return resolved[0]


def address_of(served: Served) -> str:
    return served.worker.node.http_url.removeprefix("https://")


async def test_a_model_of_another_data_worker_comes_with_its_checksums(served: Served, store: ModelStore) -> None:
    await served.add(storyteller(), "tale")
    resolved = await asyncio.to_thread(pull_from, served.authority, store, address_of(served))
    assert (resolved.model, resolved.quantization) == ("tale", "Q8_0")
    store.verify("tale", ignore)
    assert store.get("tale").files[0].sums == served.worker.store.get("tale").files[0].sums


async def test_a_split_set_of_another_data_worker_comes_whole(
    served: Served, store: ModelStore, tmp_path: Path
) -> None:
    await served.add(write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8), "parts")
    await asyncio.to_thread(pull_from, served.authority, store, address_of(served), "parts")
    assert store.get("parts").problem == ""
    assert [file.sums for file in store.get("parts").files] == [
        file.sums for file in served.worker.store.get("parts").files
    ]


async def test_what_the_other_has_not_is_said(served: Served, store: ModelStore) -> None:
    (served.folder / "byhand.gguf").write_bytes(DATA)
    for model, kind, words in (
        ("nothing", NotFound, "has no model 'nothing'"),
        ("byhand", NotReady, "not known yet: `eldric-cli models verify byhand`"),
    ):
        with pytest.raises(kind, match=words):
            await asyncio.to_thread(pull_from, served.authority, store, address_of(served), model)


async def test_a_node_of_another_cluster_or_kind_is_not_believed(served: Served, store: ModelStore) -> None:
    await served.add(storyteller(), "tale")
    with pytest.raises(Unavailable, match="does not answer"):
        await asyncio.to_thread(pull_from, Authority.create("other"), store, address_of(served))
    with lying_peer(served.authority, kind="worker") as peer, pytest.raises(Unavailable, match="does not answer"):
        await asyncio.to_thread(pull_from, served.authority, store, peer.address)


class LyingPeer:
    """Claims to be a data worker that holds a model. once: what its file is for the next requests."""

    def __init__(self) -> None:
        self.address = ""
        self.data = DATA
        self.once: list[bytes] = []
        self.blocks: Any = None
        self.content_range = f"bytes 0-{len(DATA) - 1}/{len(DATA)}"
        self.status = 200
        self.endless = False
        self.ranges: list[str] = []

    def answer(self, path: str) -> Any:
        if path.endswith("/metadata"):
            return {"info": {"quantization": "Q8_0"}}
        return self.blocks or honest_blocks()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def honest_blocks(**changes: Any) -> dict[str, Any]:
    sums = [hashlib.sha256(DATA[at : at + BLOCK_BYTES]).digest() for at in range(0, len(DATA), BLOCK_BYTES)]
    file = {
        "size_bytes": str(len(DATA)),
        "sha256": b64(hashlib.sha256(DATA).digest()),
        "block_sha256": [b64(block) for block in sums],
    }
    return {"block_bytes": str(BLOCK_BYTES), "files": [{**file, **changes}]}


@contextlib.contextmanager
def lying_peer(authority: Authority, kind: str = "data") -> Iterator[LyingPeer]:
    peer = LyingPeer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                if "/content" in self.path:
                    self._content()
                else:
                    self._send(200, json_of(peer.answer(self.path)))

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def _content(self) -> None:
            asked = self.headers.get("range", "")
            peer.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").removesuffix("-") or 0)
            data = peer.once.pop(0) if peer.once else peer.data
            self.send_response(206 if begin else peer.status)
            if begin or peer.status == 206:
                self.send_header(
                    "content-range", f"bytes {begin}-{len(DATA) - 1}/{len(DATA)}" if begin else peer.content_range
                )
            self.end_headers()
            self.wfile.write(data[begin:])
            while peer.endless:
                self.wfile.write(bytes(65536))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = authority.issue_identity(kind, "liar").server_context(ssl.CERT_REQUIRED)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    peer.address = f"127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def json_of(document: Any) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def with_damage(at: int) -> bytes:
    data = bytearray(DATA)
    data[at] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"data": with_damage(2 * BLOCK_BYTES + 7)}, r"block 2 of file 0 of tale \(from byte 2097152\) came wrong 3"),
        ({"data": with_damage(-1)}, "came wrong 3 times"),
        ({"data": DATA + b"more"}, "more bytes of file 0 of tale come than the"),
        ({"endless": True}, "more bytes of file 0 of tale come than the"),
        ({"status": 206, "content_range": f"bytes 1-{len(DATA) - 1}/{len(DATA)}"}, "another range"),
        ({"status": 206, "content_range": f"bytes 0-{len(DATA)}/{len(DATA) + 1}"}, "another range"),
        ({"status": 206, "content_range": "x"}, "another range"),
        ({"blocks": honest_blocks(size_bytes="0")}, "the size 0"),
        ({"blocks": honest_blocks(size_bytes=str(1 << 60))}, "the size"),
        ({"blocks": honest_blocks(sha256=b64(b"short"))}, "a SHA-256 that is none"),
        ({"blocks": honest_blocks(block_sha256=[b64(bytes(32))])}, "1 block sums"),
        ({"blocks": honest_blocks(sha256=b64(bytes(32)))}, "came with the SHA-256"),
        ({"blocks": honest_blocks() | {"files": []}}, "0 files"),
        ({"blocks": honest_blocks() | {"files": 7}}, "makes no sense"),
        ({"blocks": b"["}, "not JSON"),
        ({"blocks": [1]}, "makes no sense"),
    ],
)
def test_a_data_worker_that_lies_is_found_out(store: ModelStore, lie: dict[str, Any], words: str) -> None:
    authority = Authority.create("test")
    with lying_peer(authority) as peer:
        for name, value in lie.items():
            setattr(peer, name, value)
        with pytest.raises(DataLoss, match=words):
            pull_from(authority, store, peer.address)
    assert store.list() == []
    assert {path.name for path in store.folder.iterdir()} <= {".eldric"}


def test_a_block_that_came_wrong_once_is_fetched_again(store: ModelStore) -> None:
    authority = Authority.create("test")
    with lying_peer(authority) as peer:
        peer.once = [with_damage(3 * BLOCK_BYTES), with_damage(3 * BLOCK_BYTES + 1)]
        pull_from(authority, store, peer.address)
    assert peer.ranges == ["", f"bytes={3 * BLOCK_BYTES}-", f"bytes={3 * BLOCK_BYTES}-"]
    store.verify("tale", ignore)


def test_a_data_worker_that_ends_early_every_time_is_unavailable(store: ModelStore) -> None:
    authority = Authority.create("test")
    with lying_peer(authority) as peer:
        peer.data = DATA[:1000]
        with pytest.raises(Unavailable, match="ask again to go on"):
            pull_from(authority, store, peer.address)
    assert store.list() == []
