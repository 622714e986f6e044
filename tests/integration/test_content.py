"""A model's file over HTTP: whole, in ranges, and to nobody who should not have it."""

import base64
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from eldric.channels import call_errors
from eldric.errors import DataLoss
from eldric.security import Authority
from eldric.security.access import RULES, Rule
from eldric.v1 import model_store_pb2 as pb
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


async def test_content_is_the_file_with_its_digests(served: Served) -> None:
    await served.add(storyteller(), "tale")
    data = storyteller().read_bytes()
    digest = hashlib.sha256(data)
    answer = await served.http.get("/api/v1/models/tale/content")
    assert answer.status_code == 200 and answer.content == data
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert 'filename="tale.gguf"' in answer.headers["content-disposition"]
    head = await served.http.head("/api/v1/models/tale/content")
    assert head.status_code == 200 and head.content == b""
    for name in ("content-length", "etag", "accept-ranges", "content-type"):
        assert head.headers[name] == answer.headers[name]


@pytest.mark.parametrize(
    ("field", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=100-199", (100, 200)),
        ("bytes=5000000-", (5000000, None)),
        ("bytes=-17", (-17, None)),
        ("bytes=0-99999999", (0, None)),
        ("bytes=7-8,90000000-", (7, 9)),
    ],
)
async def test_a_range_gives_206_and_those_bytes(served: Served, field: str, span: tuple[int, int | None]) -> None:
    await served.add(storyteller(), "tale")
    data = storyteller().read_bytes()
    answer = await served.http.get("/api/v1/models/tale/content", headers={"range": field})
    first, stop, _ = slice(*span).indices(len(data))
    assert answer.status_code == 206
    assert answer.content == data[first:stop]
    assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/{len(data)}"
    assert answer.headers["content-length"] == str(stop - first)


async def test_several_ranges_come_as_parts(served: Served) -> None:
    await served.add(storyteller(), "tale")
    data = storyteller().read_bytes()
    headers = {"range": "bytes=0-9, 1000000-3200000, -5"}
    answer = await served.http.get("/api/v1/models/tale/content", headers=headers)
    assert answer.status_code == 206
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    parts = answer.content.split(f"--{boundary}".encode())[1:-1]
    spans = [(0, 10), (1000000, 3200001), (len(data) - 5, len(data))]
    for part, (start, stop) in zip(parts, spans, strict=True):
        head, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        assert f"bytes {start}-{stop - 1}/{len(data)}".encode() in head
        assert body.removesuffix(b"\r\n") == data[start:stop]


async def test_a_range_past_the_end_is_416_and_what_is_no_range_is_ignored(served: Served) -> None:
    await served.add(storyteller(), "tale")
    size = storyteller().stat().st_size
    for field in ("bytes=99999999-", "bytes=-0"):
        answer = await served.http.get("/api/v1/models/tale/content", headers={"range": field})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
    for field in ("bytes=9-2", "bytes=x", "lines=1-2"):
        answer = await served.http.get("/api/v1/models/tale/content", headers={"range": field})
        assert answer.status_code == 200 and len(answer.content) == size


async def test_conditional_requests_follow_the_etag(served: Served) -> None:
    await served.add(storyteller(), "tale")
    url = "/api/v1/models/tale/content"
    etag = (await served.http.head(url)).headers["etag"]
    known = await served.http.get(url, headers={"if-none-match": f'"other", {etag}'})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", etag)
    part = await served.http.get(url, headers={"range": "bytes=0-3", "if-range": etag})
    assert (part.status_code, part.content) == (206, b"GGUF")
    other = await served.http.get(url, headers={"range": "bytes=0-3", "if-range": '"other"'})
    assert other.status_code == 200


async def test_content_of_a_split_set_is_asked_for_by_number(served: Served, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("parts-*"))
    await served.add(first)
    url = "/api/v1/models/parts/content"
    for number, part in enumerate(parts):
        assert (await served.http.get(f"{url}?file={number}")).content == part.read_bytes()
    for query, code in ((f"file={len(parts)}", 404), ("file=x", 400), ("file=-1", 400), ("part=1", 400)):
        answer = await served.http.get(f"{url}?{query}")
        assert answer.status_code == code and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "../../node/key.pem",
        "..%2f..%2fnode%2fkey.pem",
        "%2e%2e",
        ".eldric",
        "nothing",
        "%00",
        "tale%2ftale.gguf",
    ],
)
async def test_no_path_leads_out_of_the_store(served: Served, path: str) -> None:
    await served.add(storyteller(), "tale")
    answer = await served.http.get(f"/api/v1/models/{path}/content")
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]


async def test_a_damaged_model_is_not_given_away(served: Served) -> None:
    (served.folder / "cut.gguf").write_bytes(storyteller().read_bytes()[:5000])
    answer = await served.http.get("/api/v1/models/cut/content")
    assert (answer.status_code, answer.json()["error"]["status"]) == (500, "DATA_LOSS")
    with pytest.raises(DataLoss, match="the file ends"), call_errors():
        await served.calls.Metadata(pb.ModelRequest(id="cut"))


async def test_a_stranger_gets_no_bytes(served: Served) -> None:
    await served.add(storyteller(), "tale")
    foreign = Authority.create("other").issue_identity("client", "tester")
    for context in (foreign.client_context(), _without_certificate(served.authority)):
        with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
            async with served.client(context) as http:
                await http.get("/api/v1/models/tale/content")


def _without_certificate(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.certificate_pem.decode())
    return context


async def test_who_may_not_pull_gets_no_content(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await served.add(storyteller(), "tale")
    monkeypatch.setitem(RULES, "ModelStore/Pull", Rule(frozenset({"worker"})))
    for kind, code in (("worker", 200), ("router", 403)):
        async with served.client(served.authority.issue_identity(kind, "a").client_context()) as http:
            assert (await http.get("/api/v1/models/tale/content")).status_code == code
