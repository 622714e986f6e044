"""A worker opens the file that was planned, below its mount, or says why not."""

from pathlib import Path

import pytest

from eldric.engine.errors import InvalidModel
from eldric.errors import InvalidRequest, NotFound, NotReady
from eldric.v1 import stage_pb2
from eldric.worker.source import open_model
from tests.models import SmallLlama, write_small_llama
from tests.rings import source_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small_llama(tmp_path / "model.gguf", SmallLlama())


def test_the_file_is_found_below_the_mount_or_else_below_the_stores_folder(path: Path, tmp_path: Path) -> None:
    source = source_of(path)
    open_model(source, None).close()
    mount = tmp_path / "mount"
    mount.mkdir()
    path.rename(mount / path.name)
    open_model(source, mount).close()
    with pytest.raises(NotFound, match="--models-dir"):
        open_model(source, None)


@pytest.mark.parametrize(
    "name", ["../model.gguf", "a/../../model.gguf", "/etc/hostname", "", ".", "mod\0el.gguf", ".."]
)
def test_no_path_leads_out_of_the_store(path: Path, name: str) -> None:
    source = source_of(path)
    source.files[0].path = name
    (path.parent / "below").mkdir()
    with pytest.raises(InvalidRequest, match="does not lie in the model store"):
        open_model(source, path.parent / "below")


def test_a_store_without_an_absolute_folder_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(path)
    monkeypatch.chdir(path.parent)
    for folder in ("", ".", "models"):
        source.folder = folder
        with pytest.raises(InvalidRequest, match="absolute"):
            open_model(source, None)
    with pytest.raises(InvalidRequest, match="no model file"):
        open_model(stage_pb2.ModelSource(folder="/models"), None)


def test_another_size_or_header_is_not_the_planned_file(path: Path) -> None:
    source = source_of(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(NotReady, match=rf"has {len(data) - 1} bytes here and {len(data)} in the model store"):
        open_model(source, None)
    path.write_bytes(data.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"))
    with pytest.raises(NotReady, match="header differs"):
        open_model(source, None)


def test_a_damaged_header_is_an_invalid_model(path: Path) -> None:
    source = source_of(path)
    path.write_bytes(b"GGUX" + path.read_bytes()[4:])
    with pytest.raises(InvalidModel):
        open_model(source, None)


def test_what_cannot_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(path)
    source.files[0].path = "model.gguf/inside"
    with pytest.raises(NotFound, match=r"model\.gguf/inside"):
        open_model(source, None)
    source.files[0].path = "n" * 5000
    with pytest.raises(NotReady, match="cannot be read on this worker: File name too long"):
        open_model(source, None)


def test_every_part_of_a_split_set_is_looked_at(tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "split.gguf", SmallLlama(), split_tensors=8)
    source = source_of(first)
    open_model(source, None).close()
    last = tmp_path / source.files[-1].path
    last.write_bytes(last.read_bytes() + b"x")
    with pytest.raises(NotReady, match=last.name):
        open_model(source, None)
    last.unlink()
    with pytest.raises(NotFound, match=last.name):
        open_model(source, None)
