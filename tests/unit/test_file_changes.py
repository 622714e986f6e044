"""What counts as a change of a file that a stage maps, and which of two kinds it is."""

import os
from pathlib import Path

import pytest

from eldric.worker.mounted.changes import Changes, FileStamp, changes, stamps_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.gguf"
    made.write_bytes(b"x" * 100)
    os.utime(made, ns=(1, 1))
    return made


def since(loaded: FileStamp) -> Changes:
    return changes([loaded], stamps_of([loaded.path]))


def test_a_file_that_is_only_read_linked_or_copied_over_by_its_like_is_the_same(path: Path) -> None:
    loaded = FileStamp.of(path)
    path.read_bytes()
    os.link(path, path.with_name("link"))
    path.chmod(0o600)
    assert since(loaded) == Changes()
    like = path.with_name("like")
    like.write_bytes(b"x" * 100)
    os.utime(like, ns=(1, 1))
    like.replace(path)
    assert since(loaded) == Changes()


def test_another_file_in_its_place_or_none_is_told_apart_from_a_change(path: Path) -> None:
    loaded = FileStamp.of(path)
    other = path.with_name("other")
    other.write_bytes(b"other")
    other.replace(path)
    assert since(loaded) == Changes(replaced=f"{path} was replaced by another file")
    path.unlink()
    assert since(loaded) == Changes(replaced=f"{path} was removed")


def test_what_is_cut_or_written_into_is_named_with_its_sizes(path: Path) -> None:
    loaded = FileStamp.of(path)
    with path.open("r+b") as file:
        file.write(b"y")
    assert since(loaded) == Changes(f"{path} was changed in place while this stage mapped it")
    os.truncate(path, 10)
    assert since(loaded) == Changes(f"{path} was changed in place from 100 to 10 bytes while this stage mapped it")


def test_a_file_that_nobody_could_look_at_has_not_changed(path: Path) -> None:
    assert changes([FileStamp.of(path)], {}) == Changes()
