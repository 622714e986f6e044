"""Imports into a model store: all of a model, or nothing."""

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from eldric.data import checksums
from eldric.data.importer import Importer
from eldric.data.store import ModelStore
from eldric.engine.errors import InvalidModel
from eldric.errors import AlreadyExists, DataLoss, InvalidRequest, NotEnoughSpace, NotFound, NotReady
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import as_unknown_architecture, ignore

MIB = 1 << 20


class Interrupted(Exception):
    pass


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on another file system than the source."""

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small_llama(tmp_path / "small.gguf", SmallLlama())


def nothing_is_left(store: ModelStore) -> bool:
    incoming = store.folder / ".eldric" / "incoming"
    staged = list(incoming.iterdir()) if incoming.exists() else []
    return not store.list() and not staged and not [path for path in store.folder.iterdir() if path.name[0] != "."]


def test_an_import_links_and_reports_each_byte_that_it_hashes(store: ModelStore, source: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    model = Importer(store).run(str(source), "", "", lambda *report: reports.append(report))
    assert model.id == "small"
    assert os.path.samefile(model.path(0), source)
    size = source.stat().st_size
    assert reports[0] == ("hashing", 0, size) and reports[-1] == ("hashing", size, size)
    assert model.files[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_links")
def test_an_import_copies_where_it_cannot_link(store: ModelStore, source: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    model = Importer(store).run(str(source), "", "copy", lambda *report: reports.append(report))
    assert model.path(0).read_bytes() == source.read_bytes()
    assert not os.path.samefile(model.path(0), source)
    assert reports[-1] == ("copying", source.stat().st_size, source.stat().st_size)
    store.verify("small", ignore)


@pytest.mark.parametrize("links", [True, False])
def test_a_move_removes_the_files_that_were_given(
    store: ModelStore, tmp_path: Path, links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    data = [part.read_bytes() for part in parts]
    model = Importer(store).run(str(first), "renamed", "move", ignore)
    assert [model.path(number).read_bytes() for number in range(len(parts))] == data
    assert model.files[0].path.name == f"renamed-00001-of-{len(parts):05}.gguf"
    assert not list(tmp_path.glob("parts-*"))
    assert model.problem == ""


def test_any_part_of_a_split_set_imports_the_whole_set(store: ModelStore, tmp_path: Path) -> None:
    write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8, empty_first=True)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    model = Importer(store).run(str(parts[1]), "", "copy", ignore)
    assert model.id == "parts"
    assert len(model.files) == len(parts)


def test_a_link_to_a_file_imports_what_it_points_to(store: ModelStore, tmp_path: Path, source: Path) -> None:
    blob = tmp_path / "blobs" / "b179c952"
    blob.parent.mkdir()
    source.rename(blob)
    source.symlink_to(blob)
    model = Importer(store).run(str(source), "", "copy", ignore)
    assert not model.path(0).is_symlink()
    assert os.path.samefile(model.path(0), blob)
    assert model.problem == ""


def test_a_file_of_the_folder_itself_can_be_moved_in_under_its_own_name(store: ModelStore) -> None:
    path = write_small_llama(store.folder / "small.gguf", SmallLlama())
    with pytest.raises(AlreadyExists):
        Importer(store).run(str(path), "", "copy", ignore)
    model = Importer(store).run(str(path), "", "move", ignore)
    assert model.imported and not path.exists()
    assert [found.id for found in store.list()] == ["small"]


def test_a_file_of_another_model_can_be_copied_but_not_moved(store: ModelStore, source: Path) -> None:
    path = Importer(store).run(str(source), "one", "copy", ignore).path(0)
    with pytest.raises(InvalidRequest, match="belongs to a model"):
        Importer(store).run(str(path), "two", "move", ignore)
    Importer(store).run(str(path), "two", "copy", ignore)
    assert [model.problem for model in store.list()] == ["", ""]


def test_a_model_of_an_unknown_architecture_can_be_imported(store: ModelStore, tmp_path: Path) -> None:
    path = as_unknown_architecture(tmp_path / "odd.gguf", storyteller())
    assert "mamba" in Importer(store).run(str(path), "", "copy", ignore).problem


def test_a_name_in_use_is_refused_and_the_model_stays(store: ModelStore, source: Path) -> None:
    Importer(store).run(str(storyteller()), "tale", "copy", ignore)
    with pytest.raises(AlreadyExists, match="'tale'"):
        Importer(store).run(str(source), "tale", "copy", ignore)
    assert store.get("tale").sound_header.layers == 6
    (store.folder / "small").touch()
    with pytest.raises(AlreadyExists, match="another file"):
        Importer(store).run(str(source), "small", "copy", ignore)


def test_of_two_imports_under_one_name_at_once_one_wins(store: ModelStore, source: Path) -> None:
    importer = Importer(store)
    begun, finish = threading.Event(), threading.Event()

    def slow(*report: object) -> None:
        begun.set()
        finish.wait(10)

    winner = threading.Thread(target=importer.run, args=(str(storyteller()), "tale", "copy", slow))
    winner.start()
    assert begun.wait(10)
    with pytest.raises(AlreadyExists, match="right now"):
        importer.run(str(source), "tale", "copy", ignore)
    finish.set()
    winner.join(10)
    assert store.get("tale").sound_header.layers == 6


def test_of_two_processes_that_import_under_one_name_one_wins(store: ModelStore, source: Path) -> None:
    def second(*report: object) -> None:
        if not store.find("tale"):
            Importer(ModelStore(store.folder)).run(str(storyteller()), "tale", "copy", ignore)

    with pytest.raises(AlreadyExists):
        Importer(store).run(str(source), "tale", "copy", second)
    assert store.get("tale").sound_header.layers == 6


@pytest.mark.parametrize("links", [True, False])
def test_an_import_that_is_interrupted_leaves_nothing(
    store: ModelStore, source: Path, links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")

    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            raise Interrupted

    with pytest.raises(Interrupted):
        Importer(store).run(str(source), "", "move", interrupt)
    assert nothing_is_left(store)
    assert source.exists()
    Importer(store).run(str(source), "", "copy", ignore)


def test_a_file_that_changes_during_its_import_is_refused(store: ModelStore, source: Path) -> None:
    def write(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            os.utime(source)

    with pytest.raises(InvalidModel, match="changed while it was imported"):
        Importer(store).run(str(source), "", "copy", write)
    assert nothing_is_left(store)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_grows_during_its_import_is_refused(
    store: ModelStore, source: Path, links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")

    def write(phase: str, done_bytes: int, total_bytes: int) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with pytest.raises(InvalidModel, match="grows while it is imported"):
        Importer(store).run(str(source), "", "copy", write)
    assert nothing_is_left(store)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def made_empty(path: Path) -> None:
    path.write_bytes(b"")


def made_text(path: Path) -> None:
    path.write_text("This is the readme of a model, and not a model.")


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (truncated, "but the file has"),
        (made_empty, "the file is empty"),
        (made_text, "not a GGUF file"),
        (header_cut, "the file ends"),
    ],
)
@pytest.mark.parametrize("mode", ["copy", "move"])
def test_a_damaged_file_is_refused_and_stays_where_it_is(
    store: ModelStore, source: Path, harm: Callable[[Path], None], problem: str, mode: str
) -> None:
    harm(source)
    with pytest.raises(InvalidModel, match=problem):
        Importer(store).run(str(source), "", mode, ignore)
    assert nothing_is_left(store)
    assert source.exists()


def test_a_split_set_that_lacks_a_part_is_refused(store: ModelStore, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    sorted(tmp_path.glob("parts-*.gguf"))[-1].unlink()
    with pytest.raises(InvalidModel, match="missing"):
        Importer(store).run(str(first), "", "copy", ignore)
    assert nothing_is_left(store)


def test_a_referenced_file_is_served_where_it_lies(store: ModelStore, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    model = Importer(store).run(str(first), "seen", "reference", ignore)
    assert [(model.folder / file.path).readlink() for file in model.files] == parts
    assert model.problem == "" and all(file.sums.blocks for file in model.files)
    store.verify("seen", ignore)
    store.remove("seen")
    assert sorted(tmp_path.glob("parts-*.gguf")) == parts
    assert store.list() == []


def test_a_file_of_the_store_itself_is_not_referenced(store: ModelStore) -> None:
    path = write_small_llama(store.folder / "small.gguf", SmallLlama())
    with pytest.raises(InvalidRequest, match="lies in the model store"):
        Importer(store).run(str(path), "other", "reference", ignore)


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def replaced(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    write_small_llama(path, SmallLlama(seed=1))


def replaced_by_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


def header_changed(path: Path) -> None:
    """In a way that neither size nor time of change tell."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    key = b"llama.context_length"
    data[data.index(key) + len(key) + 4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (rewritten, "changed since it was referenced: remove the model"),
        (replaced, "changed since it was referenced"),
        (replaced_by_a_link, "changed since it was referenced"),
        (header_changed, "header changed since it was referenced"),
        (Path.unlink, "which it refers to, is missing"),
    ],
)
def test_a_referenced_file_that_changed_is_noticed(
    store: ModelStore, source: Path, harm: Callable[[Path], None], words: str
) -> None:
    Importer(store).run(str(source), "seen", "reference", ignore)
    harm(source)
    again = ModelStore(store.folder)
    assert words in again.get("seen").problem
    with pytest.raises(DataLoss, match=words):
        _ = again.get("seen").sound_header
    with pytest.raises(DataLoss):
        again.verify("seen", ignore)
    again.remove("seen")


@pytest.mark.parametrize("model", ["../escape", "/escape", "..", ".hidden", "a/b", "x-00001-of-00002"])
def test_a_name_that_leads_elsewhere_is_refused(store: ModelStore, source: Path, model: str) -> None:
    with pytest.raises(InvalidRequest):
        Importer(store).run(str(source), model, "copy", ignore)
    assert nothing_is_left(store)
    assert not (store.folder.parent / "escape").exists()


@pytest.mark.parametrize("path", ["", "small.gguf", "./small.gguf", "~/small.gguf", "/small\0.gguf"])
def test_a_path_that_is_not_absolute_is_refused(store: ModelStore, path: str) -> None:
    with pytest.raises(InvalidRequest, match="absolute path"):
        Importer(store).run(path, "x", "copy", ignore)


def test_what_is_no_readable_file_is_refused(store: ModelStore, tmp_path: Path, source: Path) -> None:
    importer = Importer(store)
    for path in (tmp_path / "nothing.gguf", source / "below.gguf"):
        with pytest.raises(NotFound, match="there is no file"):
            importer.run(str(path), "x", "copy", ignore)
    with pytest.raises(InvalidRequest, match="is a folder"):
        importer.run(str(tmp_path), "x", "copy", ignore)
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        with pytest.raises(InvalidRequest, match="is not a file"):
            importer.run(str(path), "x", "copy", ignore)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        importer.run(f"/{'x' * 300}", "x", "copy", ignore)
    with pytest.raises(InvalidRequest, match="modes are copy, move, link, reference"):
        importer.run(str(source), "x", "steal", ignore)
    assert nothing_is_left(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_files_and_folders_without_permission_are_refused(store: ModelStore, source: Path) -> None:
    source.chmod(0)
    with pytest.raises(InvalidRequest, match="cannot be read: Permission denied"):
        Importer(store).run(str(source), "x", "copy", ignore)
    source.chmod(0o644)
    store.folder.chmod(0o500)
    with pytest.raises(NotReady, match="cannot be written: Permission denied"):
        Importer(store).run(str(source), "x", "copy", ignore)
    store.folder.chmod(0o700)
    source.parent.chmod(0o500)
    try:
        with pytest.raises(InvalidRequest, match="copy it instead"):
            Importer(store).run(str(source), "x", "move", ignore)
    finally:
        source.parent.chmod(0o700)


def test_an_unreadable_source_names_the_reason(
    store: ModelStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("eldric.data.importer.read_header", refuse)
    with pytest.raises(InvalidRequest, match=r"small\.gguf cannot be read: Permission denied"):
        Importer(store).run(str(source), "x", "copy", ignore)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "eldric-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_copy_that_does_not_fit_is_refused_before_it_begins(small_disk: Path) -> None:
    store = ModelStore(small_disk)
    with pytest.raises(NotEnoughSpace, match=f"needs {storyteller().stat().st_size} bytes.*are missing"):
        Importer(store).run(str(storyteller()), "tale", "copy", ignore)
    assert nothing_is_left(store)


def test_a_disk_that_fills_during_a_copy_is_left_as_it_was(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eldric.data.importer._Transfer._check_space", lambda self, number: None)
    store = ModelStore(small_disk)
    with pytest.raises(NotEnoughSpace, match="is full"):
        Importer(store).run(str(storyteller()), "tale", "copy", ignore)
    assert nothing_is_left(store)
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize > 3 * MIB


def test_a_huge_file_is_imported_in_flat_memory(store: ModelStore, source: Path) -> None:
    size = 256 * MIB
    os.truncate(source, size)  # sparse: it takes no disk
    process = psutil.Process()
    before = process.memory_info().rss
    most = 0

    def watch(phase: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    model = Importer(store).run(str(source), "", "copy", watch)
    assert model.size_bytes == size
    assert most - before < 32 * MIB


def test_a_clone_that_a_file_system_cannot_make_leaves_no_file(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "clone"
    if checksums.try_clone(source, target):
        assert target.read_bytes() == source.read_bytes()
    else:
        assert not target.exists()
