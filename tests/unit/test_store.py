"""The model store: what it lists, keeps, checks and removes."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from eldric.data.checksums import sums_of
from eldric.data.importer import Importer
from eldric.data.store import ModelStore
from eldric.errors import AlreadyExists, DataLoss, InvalidRequest, NotFound, NotReady
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import as_unknown_architecture, damage, ignore


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def import_storyteller(store: ModelStore, model: str = "storyteller") -> None:
    Importer(store).run(str(storyteller()), model, "copy", ignore)


def test_an_imported_model_is_listed_with_what_its_header_says(store: ModelStore) -> None:
    import_storyteller(store)
    (model,) = store.list()
    assert (model.id, model.imported, model.problem) == ("storyteller", True, "")
    assert model.size_bytes == storyteller().stat().st_size
    assert model.files[0].sha256 == hashlib.sha256(storyteller().read_bytes()).hexdigest()
    header = model.sound_header
    assert (header.architecture, header.layers, header.hidden_size) == ("llama", 6, 256)
    assert (header.heads, header.kv_heads, header.vocab_size) == (8, 4, 839)
    assert header.quantization == "Q8_0"
    assert header.entries["tokenizer.ggml.tokens"] == "array of 839"
    assert header.costs is not None and len(header.costs.layer_bytes) == 6


def test_files_dropped_by_hand_are_listed_by_their_names(store: ModelStore) -> None:
    shutil.copy(storyteller(), store.folder / "My model (v2).gguf")
    write_small_llama(store.folder / "parts.gguf", SmallLlama(), split_tensors=8)
    (store.folder / "notes.txt").write_text("not a model")
    (store.folder / ".hidden.gguf").write_bytes(storyteller().read_bytes())
    (store.folder / "folder.gguf").mkdir()
    models = {model.id: model for model in store.list()}
    assert list(models) == ["My-model-v2", "parts"]
    assert not models["parts"].imported
    assert len(models["parts"].files) > 1
    assert models["My-model-v2"].files[0].sha256 == ""
    assert store.get("My-model-v2").id == "My-model-v2"


def test_an_imported_model_hides_a_file_of_the_same_name(store: ModelStore) -> None:
    import_storyteller(store, "tale")
    write_small_llama(store.folder / "tale.gguf", SmallLlama())
    assert [model.sound_header.layers for model in store.list()] == [6]
    assert store.get("tale").imported


def test_a_header_is_parsed_again_only_when_the_file_changes(store: ModelStore) -> None:
    path = write_small_llama(store.folder / "small.gguf", SmallLlama(layers=2))
    first = store.get("small").header
    assert store.list()[0].header is first
    assert store.get("small").header is first
    write_small_llama(path, SmallLlama(layers=3))
    assert store.get("small").sound_header.layers == 3


def test_a_split_set_with_a_missing_part_says_which(store: ModelStore) -> None:
    first = write_small_llama(store.folder / "parts.gguf", SmallLlama(), split_tensors=8)
    last = sorted(store.folder.glob("*.gguf"))[-1]
    last.unlink()
    (model,) = store.list()
    assert model.problem == f"parts: the file {last.name} is missing"
    with pytest.raises(DataLoss, match="is missing"):
        _ = model.sound_header
    first.unlink()
    assert store.list() == []


def test_a_model_of_an_unknown_architecture_is_listed_and_flagged(store: ModelStore) -> None:
    as_unknown_architecture(store.folder / "odd.gguf", storyteller())
    (model,) = store.list()
    assert "mamba" in model.problem
    header = model.sound_header
    assert (header.architecture, header.layers, header.hidden_size, header.vocab_size) == ("mamba", 6, 256, 839)
    assert header.costs is None and header.spec is None


def test_a_damaged_header_is_listed_with_what_is_wrong(store: ModelStore) -> None:
    (store.folder / "cut.gguf").write_bytes(storyteller().read_bytes()[:5000])
    (store.folder / "empty.gguf").touch()
    (store.folder / "text.gguf").write_text("once upon a time there was a file that is no model")
    problems = {model.id: model.problem for model in store.list()}
    assert "the file ends" in problems["cut"]
    assert "empty" in problems["empty"]
    assert "not a GGUF file" in problems["text"]
    for model in problems:
        with pytest.raises(DataLoss):
            _ = store.get(model).sound_header


def test_a_sound_model_verifies_with_progress(store: ModelStore) -> None:
    import_storyteller(store)
    reports: list[tuple[str, int, int]] = []
    store.verify("storyteller", lambda *report: reports.append(report))
    size = storyteller().stat().st_size
    assert reports[-1] == ("hashing", size, size)


def test_verify_names_every_file_that_differs(store: ModelStore, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    files = Importer(store).run(str(first), "parts", "copy", ignore).files
    for file in files[1:]:
        damage(store.folder / file.path)
    with pytest.raises(DataLoss) as caught:
        store.verify("parts", ignore)
    assert all(str(file.path) in caught.value.message for file in files[1:])
    assert str(files[0].path) not in caught.value.message


def test_verify_names_the_damaged_blocks_of_a_file(store: ModelStore, tmp_path: Path) -> None:
    source = write_small_llama(tmp_path / "big.gguf", SmallLlama())
    with source.open("ab") as file:
        file.truncate(5 << 19)  # what comes after the last tensor is nobody's, but has sums too
    (file_of_store,) = Importer(store).run(str(source), "big", "copy", ignore).files
    assert len(file_of_store.sums.blocks) == 3
    path = store.folder / file_of_store.path
    damage(path)
    with pytest.raises(DataLoss, match=r": damaged is block 2 \(bytes 2097152 to 2621439\)"):
        store.verify("big", ignore)


def test_what_verify_finds_damaged_is_so_for_everybody_until_it_is_mended(store: ModelStore) -> None:
    import_storyteller(store)
    (file,) = store.get("storyteller").files
    path = store.folder / file.path
    whole = path.read_bytes()
    damage(path)
    assert not store.get("storyteller").problem, "nobody has looked"
    with pytest.raises(DataLoss, match="has the SHA-256"):
        store.verify("storyteller", ignore)
    for each in (store, ModelStore(store.folder)):
        (listed,) = each.list()
        assert listed.problem == (
            "storyteller: storyteller/storyteller.gguf is damaged: `eldric-cli models verify storyteller` says where"
        )
        with pytest.raises(DataLoss, match="is damaged"):
            _ = each.get("storyteller").sound_header
    path.write_bytes(whole)
    assert not store.get("storyteller").problem
    store.verify("storyteller", ignore)


def test_a_file_that_is_found_sound_again_is_sound(store: ModelStore) -> None:
    """A reading that failed once, say: the file is as old as it was."""
    import_storyteller(store)
    (file,) = store.get("storyteller").files
    path = store.folder / file.path
    whole, changed_ns = path.read_bytes(), path.stat().st_mtime_ns
    damage(path)
    os.utime(path, ns=(changed_ns, changed_ns))
    with pytest.raises(DataLoss):
        store.verify("storyteller", ignore)
    path.write_bytes(whole)
    os.utime(path, ns=(changed_ns, changed_ns))
    assert store.get("storyteller").problem
    store.verify("storyteller", ignore)
    assert not store.get("storyteller").problem


def test_a_model_that_is_added_again_is_not_damaged(store: ModelStore) -> None:
    import_storyteller(store)
    (file,) = store.get("storyteller").files
    damage(store.folder / file.path)
    with pytest.raises(DataLoss):
        store.verify("storyteller", ignore)
    store.remove("storyteller")
    import_storyteller(store)
    assert not store.get("storyteller").problem


def test_a_model_of_a_manifest_without_block_sums_is_served_and_verified(store: ModelStore) -> None:
    import_storyteller(store)
    whole = json.loads((store.folder / "storyteller" / "manifest.json").read_text())
    del whole["block_bytes"], whole["files"][0]["blocks"]
    (store.folder / "storyteller" / "manifest.json").write_text(json.dumps(whole))
    assert store.get("storyteller").files[0].sums.blocks == ()
    store.verify("storyteller", ignore)


def test_verify_tells_a_file_that_became_shorter_or_is_gone(store: ModelStore) -> None:
    import_storyteller(store)
    path = store.get("storyteller").path(0)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])
    with pytest.raises(DataLoss, match="bytes, it had"):
        store.verify("storyteller", ignore)
    path.unlink()
    with pytest.raises(DataLoss, match=r"storyteller\.gguf cannot be read: No such file"):
        store.verify("storyteller", ignore)


def test_the_sum_of_a_file_dropped_by_hand_is_kept_by_its_first_check(store: ModelStore) -> None:
    path = store.folder / "tale.gguf"
    shutil.copy(storyteller(), path)
    store.verify("tale", ignore)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = ModelStore(store.folder).get("tale").files[0].sums
    assert sums == sums_of(path, lambda _: None) and sums.sha256 == known
    times = path.stat()
    damage(path)  # rot: neither size nor time of change tell
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataLoss, match=known):
        ModelStore(store.folder).verify("tale", ignore)
    os.utime(path)  # somebody wrote another file: a new first check
    assert store.get("tale").files[0].sha256 == ""
    store.verify("tale", ignore)


def test_a_removed_model_is_gone_and_open_files_read_on(store: ModelStore) -> None:
    import_storyteller(store)
    with store.get("storyteller").path(0).open("rb") as file:
        store.remove("storyteller")
        assert file.read() == storyteller().read_bytes()
    assert store.list() == []
    assert [path.name for path in store.folder.iterdir()] == [".eldric"]
    assert not [path for path in (store.folder / ".eldric" / "removed").iterdir()]
    with pytest.raises(NotFound, match="'storyteller'"):
        store.remove("storyteller")


def test_a_model_can_be_removed_from_a_disk_that_is_too_full_for_a_folder(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import_storyteller(store)
    monkeypatch.setattr(Path, "mkdir", full)
    store.remove("storyteller")
    assert store.list() == [] and not (store.folder / "storyteller").exists()


def test_removing_files_dropped_by_hand_removes_all_parts_and_nothing_else(store: ModelStore) -> None:
    write_small_llama(store.folder / "parts.gguf", SmallLlama(), split_tensors=8)
    shutil.copy(storyteller(), store.folder / "tale.gguf")
    store.remove("parts")
    assert [model.id for model in store.list()] == ["tale"]
    assert not list(store.folder.glob("parts*"))


@pytest.mark.parametrize(
    "model",
    ["", ".", "..", "../other", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\0b", "a b", "ä", "a\n", "x" * 129, "-x"],
)
def test_what_is_no_name_finds_and_removes_nothing(store: ModelStore, model: str) -> None:
    outside = store.folder.parent / "other"
    outside.mkdir()
    for call in (store.get, store.remove):
        with pytest.raises(InvalidRequest, match="no name for a model"):
            call(model)
    assert outside.exists()


@pytest.mark.parametrize("model", ["a", "A.b-c_d:8b", "llama-3.1:8b-q4_k_m", "x" * 128, "a..b", "0"])
def test_names_of_models_may_be_like_those_of_registries(store: ModelStore, model: str) -> None:
    import_storyteller(store, model)
    assert [found.id for found in store.list()] == [model]
    store.verify(model, ignore)
    store.remove(model)


def test_a_name_that_ends_like_a_part_is_refused(store: ModelStore) -> None:
    with pytest.raises(InvalidRequest, match="part of a split set"):
        store.get("model-00001-of-00002")


def test_links_out_of_the_store_are_not_served(store: ModelStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(storyteller(), outside / "secret.gguf")
    (store.folder / "leak.gguf").symlink_to(outside / "secret.gguf")
    (store.folder / "gone.gguf").symlink_to(outside / "nothing.gguf")
    (store.folder / "loop.gguf").symlink_to(store.folder / "loop.gguf")
    shutil.copy(storyteller(), store.folder / "tale.gguf")
    (store.folder / "alias.gguf").symlink_to("tale.gguf")
    problems = {model.id: model.problem for model in store.list()}
    assert problems.keys() == {"leak", "loop", "tale", "alias"}
    assert "link out of the model store" in problems["leak"]
    assert problems["loop"]
    assert problems["tale"] == problems["alias"] == ""
    store.remove("leak")
    store.remove("alias")
    assert (outside / "secret.gguf").exists() and (store.folder / "tale.gguf").exists()


def test_a_folder_that_is_a_link_out_of_the_store_is_not_served(store: ModelStore, tmp_path: Path) -> None:
    other = ModelStore(tmp_path / "other")
    import_storyteller(other, "tale")
    (store.folder / "tale").symlink_to(other.folder / "tale")
    assert "link out of the model store" in store.get("tale").problem
    store.remove("tale")
    assert store.list() == [] and other.get("tale").problem == ""


def test_a_link_is_followed_to_the_referenced_file_alone(store: ModelStore, tmp_path: Path) -> None:
    mine, secret = tmp_path / "mine.gguf", tmp_path / "secret.gguf"
    for path in (mine, secret):
        shutil.copy(storyteller(), path)
    Importer(store).run(str(mine), "seen", "reference", ignore)
    link = store.folder / "seen" / "seen.gguf"
    link.unlink()
    link.symlink_to(secret)
    assert "changed since it was referenced" in store.get("seen").problem
    link.unlink()
    shutil.copy(secret, link)
    assert "changed since it was referenced" in store.get("seen").problem


def rewrite_manifest(store: ModelStore, **changes: object) -> None:
    path = store.folder / "storyteller" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_of_another_version_is_refused(store: ModelStore) -> None:
    import_storyteller(store)
    rewrite_manifest(store, version=2)
    assert store.list()[0].problem == ("storyteller: its manifest is of version 2, this program reads version 1")
    for call in (lambda: store.get("storyteller").sound_header, lambda: store.verify("storyteller", ignore)):
        with pytest.raises(NotReady, match="version 2"):
            call()
    with pytest.raises(AlreadyExists):
        import_storyteller(store)
    store.remove("storyteller")
    assert store.list() == []


@pytest.mark.parametrize(
    "files",
    [
        [],
        "storyteller.gguf",
        [{"name": "../../secret.gguf", "size_bytes": 1, "sha256": "0" * 64}],
        [{"name": "/etc/passwd", "size_bytes": 1, "sha256": "0" * 64}],
        [{"name": "storyteller.gguf", "size_bytes": -1, "sha256": "0" * 64}],
        [{"name": "storyteller.gguf", "size_bytes": True, "sha256": "0" * 64}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "short"}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "0" * 64, "blocks": ["0" * 64] * 2}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "0" * 64, "blocks": ["short"]}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "0" * 64, "blocks": {"0": "0"}}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "0" * 64, "reference": "/etc/passwd"}],
        [{"name": "storyteller.gguf", "size_bytes": 1, "sha256": "0" * 64, "reference": {"path": "../x"}}],
        [
            {
                "name": "storyteller.gguf",
                "size_bytes": 1,
                "sha256": "0" * 64,
                "reference": {"path": "/x", "modified_ns": "1"},
            }
        ],
        [{"name": "storyteller.gguf"}],
        [None],
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(store: ModelStore, files: object) -> None:
    import_storyteller(store)
    rewrite_manifest(store, files=files)
    assert "manifest" in store.list()[0].problem


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"x" * (1 << 21)])
def test_a_manifest_that_is_not_json_is_refused(store: ModelStore, text: bytes) -> None:
    import_storyteller(store)
    (store.folder / "storyteller" / "manifest.json").write_bytes(text)
    assert "manifest" in store.list()[0].problem


def test_a_model_whose_file_was_exchanged_for_one_of_another_size_is_refused(store: ModelStore) -> None:
    import_storyteller(store)
    path = store.get("storyteller").path(0)
    path.unlink()
    write_small_llama(path, SmallLlama())
    assert "bytes, it had" in store.get("storyteller").problem


def test_what_a_killed_import_or_removal_left_is_not_listed_and_cleaned(store: ModelStore) -> None:
    import_storyteller(store)
    for name in ("incoming", "removed"):
        left = store.folder / ".eldric" / name / "0123"
        shutil.copytree(store.folder / "storyteller", left)
    assert len(store.list()) == 1
    store.clean()
    for name in ("incoming", "removed"):
        assert not list((store.folder / ".eldric" / name).iterdir())
    assert len(store.list()) == 1


def test_cleaning_leaves_the_import_of_another_process_alone(store: ModelStore) -> None:
    with ModelStore(store.folder).staging() as staged:
        store.clean()
        assert staged.exists()
    assert not staged.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_does_not_hide_the_rest(store: ModelStore) -> None:
    import_storyteller(store)
    import_storyteller(store, "locked")
    shutil.copy(storyteller(), store.folder / "unreadable.gguf")
    (store.folder / "unreadable.gguf").chmod(0)
    (store.folder / "locked").chmod(0)
    (store.folder / ".eldric").chmod(0)
    try:
        problems = {model.id: model.problem for model in ModelStore(store.folder).list()}
        store.clean()
    finally:
        (store.folder / ".eldric").chmod(0o700)
        (store.folder / "locked").chmod(0o700)
    assert problems.keys() == {"storyteller", "unreadable"}
    assert "Permission denied" in problems["unreadable"]


def test_a_folder_that_cannot_be_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotReady, match="cannot be used"):
        ModelStore(tmp_path / "file")
    with pytest.raises(NotReady, match="cannot be used"):
        ModelStore(tmp_path / "file" / "store")


def test_a_store_whose_folder_went_away_says_so(store: ModelStore) -> None:
    shutil.rmtree(store.folder)
    with pytest.raises(NotReady, match="cannot be read"):
        store.list()
