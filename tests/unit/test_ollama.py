"""Models of an Ollama store."""

import os
from pathlib import Path
from typing import Any

import pytest

from eldric.data.http_client import Hangup
from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.peer import Peers
from eldric.data.puller import Puller, Resolved
from eldric.data.store import ModelStore
from eldric.errors import AlreadyExists, DataLoss, InvalidRequest, NotFound
from tests.ollamas import SHA256, Ollama
from tests.pulling import no_identity
from tests.stores import ignore


@pytest.fixture
def ollama(tmp_path: Path) -> Ollama:
    made = Ollama(tmp_path / "ollama")
    made.tag("library/tale/latest", made.layer)
    made.tag("library/tale/5m", made.layer)
    made.tag("someone/tale/latest", made.layer)
    return made


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def puller(store: ModelStore, ollama: Ollama) -> Puller:
    return Puller(store, Importer(store), Hub(), Peers(no_identity), ollama.folder)


def pull(puller: Puller, uri: str, model: str = "", mode: str = "") -> list[Resolved]:
    resolved: list[Resolved] = []
    puller.run(uri, model, mode, ignore, resolved.append, Hangup())
    return resolved


@pytest.mark.parametrize(
    ("uri", "model"),
    [("ollama://tale", "tale"), ("ollama://tale:5m", "tale:5m"), ("ollama://someone/tale", "someone-tale")],
)
def test_a_model_of_ollama_is_linked_and_not_copied(
    puller: Puller, store: ModelStore, ollama: Ollama, uri: str, model: str
) -> None:
    (resolved,) = pull(puller, uri)
    assert (resolved.model, resolved.files) == (model, ((ollama.blob.name, ollama.blob.stat().st_size),))
    found = store.get(model)
    assert os.path.samefile(found.path(0), ollama.blob)
    assert found.problem == "" and found.files[0].sums.sha256 == SHA256
    store.verify(model, ignore)
    ollama.blob.unlink()  # `ollama rm`: the link keeps the file
    store.verify(model, ignore)


def test_on_another_file_system_it_is_served_where_it_lies(
    puller: Puller, store: ModelStore, ollama: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eldric.data.checksums.try_link", lambda *paths: False)
    monkeypatch.setattr("eldric.data.checksums.try_clone", lambda *paths: False)
    pull(puller, "ollama://tale")
    path = store.folder / "tale" / "tale.gguf"
    assert path.is_symlink() and path.resolve() == ollama.blob
    assert store.get("tale").problem == ""
    ollama.blob.unlink()
    assert f"{ollama.blob}, which it refers to, is missing" in store.get("tale").problem


def test_what_is_there_already_is_given_and_another_model_refused(puller: Puller, store: ModelStore) -> None:
    pull(puller, "ollama://tale")
    pull(puller, "ollama://tale:latest")
    with pytest.raises(AlreadyExists, match="'tale'"):
        pull(puller, "ollama://tale:5m", "tale")


@pytest.mark.parametrize("uri", ["ollama://nothing", "ollama://tale:70b", "ollama://nobody/tale"])
def test_a_model_that_ollama_has_not_is_not_found(puller: Puller, uri: str) -> None:
    with pytest.raises(NotFound, match="Ollama has no"):
        pull(puller, uri)


def test_a_blob_that_is_damaged_is_refused(puller: Puller, store: ModelStore, ollama: Ollama) -> None:
    data = bytearray(ollama.blob.read_bytes())
    data[-100] ^= 1
    ollama.blob.write_bytes(data)
    with pytest.raises(DataLoss, match=f"it should have {SHA256}"):
        pull(puller, "ollama://tale")
    assert store.list() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "sha256:../../../../etc/passwd"}, "names no blob"),
        ({"digest": f"md5:{SHA256}"}, "names no blob"),
        ({"digest": None}, "names no blob"),
        ({"digest": f"sha256:{'1' * 64}"}, "which is not there"),
        ({"size": 12}, "Ollama's manifest says 12"),
        ({"size": "many"}, "names no blob"),
        ({"size": True}, "names no blob"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    puller: Puller, store: ModelStore, ollama: Ollama, change: dict[str, Any], words: str
) -> None:
    ollama.tag("library/liar/latest", ollama.layer | change)
    with pytest.raises(DataLoss, match=words):
        pull(puller, "ollama://liar")
    assert store.list() == []


@pytest.mark.parametrize("raw", [b"[]", b"{", b"[" * 100_000, b'{"layers": 7}', b"\xff", b" " * (2 << 20)])
def test_a_manifest_that_is_none_is_refused(puller: Puller, ollama: Ollama, raw: bytes) -> None:
    ollama.tag("library/odd/latest", raw=raw)
    with pytest.raises(DataLoss, match="makes no sense"):
        pull(puller, "ollama://odd")


def test_models_that_are_not_one_gguf_file_are_refused(puller: Puller, ollama: Ollama) -> None:
    ollama.tag("library/two/latest", ollama.layer, ollama.layer)
    ollama.tag("library/none/latest")
    ollama.tag(
        "library/adapted/latest", ollama.layer, ollama.layer | {"mediaType": "application/vnd.ollama.image.adapter"}
    )
    for name, words in (("two", "2 model layers"), ("none", "0 model layers"), ("adapted", "adapter")):
        with pytest.raises(InvalidRequest, match=words):
            pull(puller, f"ollama://{name}")


def test_a_blob_that_is_a_link_out_of_the_store_is_refused(puller: Puller, ollama: Ollama, tmp_path: Path) -> None:
    ollama.blob.rename(tmp_path / "elsewhere.gguf")
    ollama.blob.symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(DataLoss, match="no file of the Ollama store"):
        pull(puller, "ollama://tale")


def test_modes_of_an_import_hold_for_ollama_too(puller: Puller, store: ModelStore, ollama: Ollama) -> None:
    pull(puller, "ollama://tale", "seen", "reference")
    assert (store.folder / "seen" / "seen.gguf").is_symlink()
    with pytest.raises(InvalidRequest, match="mode is 'steal'"):
        pull(puller, "ollama://tale", "x", "steal")
