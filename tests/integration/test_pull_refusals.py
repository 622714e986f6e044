"""Models from a hub: what lies, or is not there, is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.peer import Peers
from eldric.data.puller import Puller
from eldric.data.store import ModelStore
from eldric.engine.errors import InvalidModel
from eldric.errors import (
    DataLoss,
    EldricError,
    InvalidRequest,
    NotFound,
    NotReady,
    PermissionDenied,
    Unavailable,
)
from tests.hubs import FakeHub
from tests.pulling import (
    REPOSITORY,
    SIZE,
    Pulling,
    is_whole,
    kept_bytes,
    no_identity,
)

pytestmark = pytest.mark.usefixtures("calm")


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda hub: setattr(hub, "change", flipped), "came with the SHA-256 .* thrown away"),
        (lambda hub: setattr(hub, "change", lambda data: data + b"more"), "were announced"),
        (lambda hub: setattr(hub, "change", lambda data: data[:-1]), "were announced"),
        (lambda hub: setattr(hub, "more", b"x" * 65536), "more bytes of .* come than the"),
    ],
)
def test_other_bytes_than_were_announced_are_refused(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], harm: Callable[[FakeHub], None], words: str
) -> None:
    harm(hub)
    with pytest.raises(DataLoss, match=words):
        pull()()
    assert store.list() == [] and kept_bytes(store) <= SIZE
    hub.change, hub.more = bytes, b""
    pull()()
    assert is_whole(store)


def described(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """A description whose entry of the model is another."""

    def change(description: dict[str, Any]) -> dict[str, Any]:
        for entry in description["siblings"]:
            if entry["rfilename"] == "Tale-Q8_0.gguf":
                lfs = {**entry["lfs"], **{key: value for key, value in changes.items() if key in entry["lfs"]}}
                entry.update({"lfs": lfs, **{key: value for key, value in changes.items() if key not in lfs}})
        return description

    return change


@pytest.mark.parametrize(
    ("describe", "kind", "words"),
    [
        (described(rfilename="../../../Tale-Q8_0.gguf"), NotFound, "no quantization Q8_0"),
        (described(rfilename="/etc/Tale-Q8_0.gguf"), NotFound, "no quantization Q8_0"),
        (described(rfilename=7), NotFound, "no quantization Q8_0"),
        (described(rfilename="Tale-Q8_0-00001-of-99999.gguf"), NotFound, "no quantization Q8_0"),
        (described(lfs=None), DataLoss, "no SHA-256"),
        (described(lfs="x"), DataLoss, "no SHA-256"),
        (described(sha256="../x"), DataLoss, "no SHA-256"),
        (described(size=-1), DataLoss, "the size -1"),
        (described(size=1 << 60), DataLoss, "the size"),
        (described(size="1"), DataLoss, "the size"),
        (lambda description: [], DataLoss, "no description"),
        (lambda description: description | {"siblings": 7}, NotFound, "no GGUF model"),
        (lambda description: description | {"sha": "main/../../x"}, DataLoss, "names no commit"),
        (lambda description: b"<html>", DataLoss, "not JSON"),
    ],
)
def test_a_hostile_description_reaches_nothing(
    store: ModelStore,
    hub: FakeHub,
    pull: Callable[[], Pulling],
    describe: Callable[[dict[str, Any]], Any],
    kind: type[EldricError],
    words: str,
) -> None:
    hub.describe = describe
    before = sorted(store.folder.parent.rglob("*"))
    with pytest.raises(kind, match=words):
        pull()()
    assert hub.downloads == [] and sorted(store.folder.parent.rglob("*")) == before


def test_a_description_without_end_is_not_read_to_its_end(
    hub: FakeHub, pull: Callable[[], Pulling], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eldric.data.http_client.MAX_JSON_BYTES", 1 << 20)
    hub.describe = lambda description: b"[" + b" " * (8 << 20)
    with pytest.raises(DataLoss, match="answers without end"):
        pull()()


def test_a_file_that_is_no_model_is_refused_and_not_kept(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    with pytest.raises(InvalidModel):
        pull()(f"hf://{REPOSITORY}:Q4_0")
    assert store.list() == [] and not list((store.folder / ".eldric" / "partial").iterdir())


@pytest.mark.parametrize(
    ("uri", "kind", "words"),
    [
        ("hf://owner/nothing", NotFound, "has no owner/nothing"),
        (f"hf://{REPOSITORY}@v9", NotFound, "revision v9"),
        (f"hf://{REPOSITORY}:Q5_K_M", NotFound, "it has Q4_0, Q8_0"),
        (f"hf://{REPOSITORY}/other.gguf", NotFound, "no file other.gguf"),
        ("ftp://x", InvalidRequest, "names no source"),
    ],
)
def test_what_the_hub_has_not_is_said(
    pull: Callable[[], Pulling], uri: str, kind: type[EldricError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        pull()(uri)


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
        ({"architecture": "llama"}, ""),
        ({"architecture": 7}, ""),
        ("x", ""),
    ],
)
def test_what_cannot_be_deployed_is_said_before_it_comes(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], about: object, problem: str
) -> None:
    hub.describe = lambda description: description | {"gguf": about}
    assert pull()().resolved[0].problem == problem
    assert is_whole(store)


def test_a_download_has_no_mode(pull: Callable[[], Pulling]) -> None:
    with pytest.raises(InvalidRequest, match="downloads have none"):
        pull()(mode="reference")


def test_a_token_is_shown_to_the_hub_and_not_to_where_it_redirects(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(PermissionDenied, match="set HF_TOKEN where the data worker runs"):
        pull()()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()()
    assert is_whole(store)
    assert {seen.token for seen in hub.seen if not seen.path.startswith("/cdn/")} >= {"Bearer hf_secret"}
    assert {seen.token for seen in hub.downloads} == {""}


def test_a_hub_does_not_send_us_into_our_own_machine(
    hub: FakeHub, pull: Callable[[], Pulling], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one sends its files' callers to "localhost", and is taken for one that is elsewhere."""
    monkeypatch.setattr("eldric.data.http_client._is_near", lambda host: host == "localhost")
    with pytest.raises(DataLoss, match="sends us to localhost, an address of this machine"):
        pull()()
    assert hub.downloads == []


def test_nothing_is_fetched_where_hubs_are_off_limits(
    hub: FakeHub, pull: Callable[[], Pulling], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotReady, match="HF_HUB_OFFLINE is set"):
        pull()()
    assert hub.seen == []


def test_a_hub_that_is_not_there_is_unavailable(store: ModelStore, hub: FakeHub) -> None:
    pulling = Pulling(store, hub)
    pulling.puller = Puller(store, Importer(store), Hub("http://127.0.0.1:9"), Peers(no_identity), None)
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 does not answer"):
        pulling()
