"""The cache of fetched ranges: what it remembers over a kill, what it lets go, and what it says of a full disk."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eldric.errors import InvalidRequest, NotEnoughSpace, NotReady
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.cache import RangeCache
from eldric.worker.range_cache.entry import EXTENTS, LEASE, CachedModel
from eldric.worker.range_cache.extents import Extent, Extents
from eldric.worker.range_cache.locks import FileLock

MIB = 1 << 20


def source(name: str = "a.gguf", size: int = 8 * MIB, **fields: bytes) -> stage_pb2.ModelSource:
    file = stage_pb2.ModelFile(path=f"model/{name}", size_bytes=size, sha256=fields.get("sha256", b""))
    return stage_pb2.ModelSource(model="model", header_sha256=fields.get("header", b"h" * 32), files=[file])


def fill(entry: CachedModel, extent: Extent) -> None:
    entry.write(0, extent.start, memoryview(b"x" * len(extent)))
    entry.add({0: [extent]})


@pytest.fixture
def cache(tmp_path: Path) -> RangeCache:
    return RangeCache(tmp_path / "cache")


@pytest.fixture
def entry(cache: RangeCache) -> Iterator[CachedModel]:
    made = cache.open(source())
    yield made
    made.close()


def test_what_was_noted_is_there_for_the_next_one_and_holes_take_no_disk(cache: RangeCache, entry: CachedModel) -> None:
    assert entry.have() == [Extents()] and entry.paths[0].stat().st_size == 8 * MIB
    fill(entry, Extent(MIB, 2 * MIB))
    entry.close()
    again = cache.open(source())
    assert again.have() == [Extents([Extent(MIB, 2 * MIB)])]
    assert again.read(0, Extent(MIB, MIB + 3)) == b"xxx"
    assert MIB <= cache.nbytes() <= 2 * MIB
    again.close()


def test_files_that_differ_in_anything_known_are_entries_of_their_own(cache: RangeCache) -> None:
    different = [
        source(),
        source(size=9 * MIB),
        source(sha256=b"s" * 32),
        source(header=b"i" * 32),
        source("b.gguf"),
    ]
    entries = [cache.open(each) for each in different]
    assert len({entry.folder for entry in entries}) == len(different)
    for entry in entries:
        entry.close()


@pytest.mark.parametrize("name", ["..", ".hidden", "a\nb", "n" * 300])
def test_names_that_are_none_are_refused(cache: RangeCache, name: str) -> None:
    with pytest.raises(InvalidRequest, match="no plain names"):
        cache.open(source(name))


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\0\1",
        b"[]",
        b'{"version": 2, "files": [[]]}',
        b'{"version": 1, "files": []}',
        b'{"version": 1, "files": [[[0, 99999999]]]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_note_counts_as_nothing(entry: CachedModel, note: bytes) -> None:
    fill(entry, Extent(0, MIB))
    (entry.folder / EXTENTS).write_bytes(note)
    assert entry.have() == [Extents()]
    fill(entry, Extent(0, 10))
    assert entry.have() == [Extents([Extent(0, 10)])]


def test_a_file_that_was_cut_or_is_gone_is_forgotten(cache: RangeCache, entry: CachedModel) -> None:
    for spoil in (lambda path: os.truncate(path, 5), lambda path: path.unlink()):
        fill(entry, Extent(0, MIB))
        spoil(entry.paths[0])
        again = cache.open(source())
        assert again.have() == [Extents()] and again.paths[0].stat().st_size == 8 * MIB
        again.close()


def test_a_link_in_place_of_a_file_is_not_followed(cache: RangeCache, entry: CachedModel, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    entry.paths[0].unlink()
    entry.paths[0].symlink_to(victim)
    with pytest.raises(NotReady, match="cannot be written"):
        cache.open(source())
    assert victim.read_bytes() == b"precious"


def test_room_is_made_by_what_was_used_least_recently_and_never_by_what_is_leased(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, limit_bytes=5 * MIB)
    entries = {name: cache.open(source(name)) for name in ("old.gguf", "leased.gguf", "young.gguf")}
    for age, (name, entry) in enumerate(reversed(entries.items())):
        cache.reserve(entry, MIB)
        fill(entry, Extent(0, MIB))
        if name != "leased.gguf":
            entry.close()
        os.utime(entry.folder / LEASE, (time.time(), time.time() - age))
    new = cache.open(source("new.gguf"))
    cache.reserve(new, 3 * MIB)
    assert not entries["old.gguf"].folder.exists()
    assert entries["leased.gguf"].folder.exists() and entries["young.gguf"].folder.exists()
    cache.reserve(new, 4 * MIB)
    assert entries["leased.gguf"].folder.exists() and not entries["young.gguf"].folder.exists()
    with pytest.raises(NotEnoughSpace, match="has no room") as caught:
        cache.reserve(new, 5 * MIB)
    assert "--cache-bytes" in caught.value.message and str(5 * MIB) in caught.value.message
    assert entries["leased.gguf"].have() == [Extents([Extent(0, MIB)])]
    new.close()
    entries["leased.gguf"].close()


def test_what_another_process_leases_stays_until_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from tests.unit.test_range_cache import *; cache = RangeCache(Path(sys.argv[1]));"
        "entry = cache.open(source('theirs.gguf')); fill(entry, Extent(0, MIB)); print('leased', flush=True);"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"leased\n"
        cache = RangeCache(tmp_path, limit_bytes=2 * MIB)
        own = cache.open(source("own.gguf"))
        with pytest.raises(NotEnoughSpace):
            cache.reserve(own, 2 * MIB)
        process.kill()
        process.wait()
        cache.reserve(own, 2 * MIB)
        own.close()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def test_a_full_disk_is_named(entry: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NotEnoughSpace, match=r"the disk of the cache in .* is full: make room, or .* --cache-dir"):
        entry.write(0, 0, memoryview(b"x"))
    monkeypatch.undo()
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(NotEnoughSpace):
        entry.add({0: [Extent(0, 1)]})
    assert entry.have() == [Extents()], "nothing is noted that is not on the disk"


def test_on_a_disk_that_others_filled_what_nobody_uses_makes_room(
    cache: RangeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the way of noting a claim, whoever filled the disk, are entries that can be fetched again."""

    def full_with_the_old(path: Path, text: str) -> int:
        if old.folder.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return path.write_bytes(text.encode())

    old, used, loading = cache.open(source("old.gguf")), cache.open(source("used.gguf")), cache.open(source())
    old.close()
    monkeypatch.setattr(Path, "write_text", full_with_the_old)
    cache.claim(loading, {0: [Extent(0, MIB)]})
    assert not old.folder.exists() and used.folder.exists()
    old.folder.mkdir()
    leased = FileLock(old.folder / LEASE)
    leased.share()
    with pytest.raises(NotEnoughSpace, match=r"the disk of the cache in .* is full: make room"):
        cache.claim(loading, {0: [Extent(0, MIB)]})
    leased.close()
    used.close()
    loading.close()


def test_bytes_are_on_the_disk_before_they_are_noted(entry: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def synced(fd: int) -> None:
        assert json.loads((entry.folder / EXTENTS).read_bytes())["files"] == [[]]
        seen.append(fd)

    seen: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced)
    fill(entry, Extent(0, MIB))
    assert seen and entry.have() == [Extents([Extent(0, MIB)])]


def test_one_fetches_into_an_entry_at_a_time(cache: RangeCache, entry: CachedModel) -> None:
    lock, other = entry.try_fetch_lock(), cache.open(source())
    assert lock is not None and other.try_fetch_lock() is None
    lock.close()
    again = other.try_fetch_lock()
    assert again is not None
    again.close()
    other.close()


def test_what_no_stage_claims_of_a_model_makes_room_for_another_split_of_it(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, limit_bytes=4 * MIB)
    serving, leaving = cache.open(source()), cache.open(source())
    for entry, extent in ((serving, Extent(0, MIB)), (leaving, Extent(MIB, 3 * MIB))):
        cache.claim(entry, {0: [extent]})
        fill(entry, extent)
    loading = cache.open(source())
    cache.claim(loading, {0: [Extent(MIB, 2 * MIB), Extent(5 * MIB, 7 * MIB)]})
    with pytest.raises(NotEnoughSpace):
        cache.reserve(loading, 2 * MIB)
    leaving.close()
    cache.reserve(loading, 2 * MIB)
    assert loading.have() == [Extents([Extent(0, 2 * MIB)])]
    assert cache.nbytes() <= 2 * MIB + 8192
    assert serving.read(0, Extent(0, MIB)) == b"x" * MIB
    assert not any(loading.read(0, Extent(2 * MIB, 3 * MIB)))
    serving.close()
    loading.close()


@pytest.mark.parametrize("claim", [b"", b"[]", b'{"0": [[0, 99999999]]}', b'{"9": []}', b'{"x": 1}'])
def test_a_claim_that_makes_no_sense_keeps_everything(cache: RangeCache, entry: CachedModel, claim: bytes) -> None:
    cache.claim(entry, {0: []})
    fill(entry, Extent(0, MIB))
    (path,) = (entry.folder / "claims").iterdir()
    path.write_bytes(claim)
    assert entry.trim() == 0 and entry.have() == [Extents([Extent(0, MIB)])]
