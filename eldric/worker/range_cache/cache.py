"""The cache of a machine: one entry for each model, and room for more by removing what was used least recently."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from eldric.errors import InvalidRequest, NotEnoughSpace, NotReady
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.entry import DATA, LEASE, RESERVED, CachedModel
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.locks import FileLock

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOCK = "lock"
_VERSION = "1"
#: What is left free on the disk, of what the cache could use, where no limit is set.
_FREE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Held:
    """An entry as room is made: how much it takes or will take, when it was used last, whether somebody leases it."""

    folder: Path
    nbytes: int
    used_at: float
    leased: bool


class RangeCache:
    """A folder that several workers of one machine may share. Thread-safe; its methods may block on the disk."""

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        """limit_bytes: of all entries; 0: nine tenths of what they take and the disk has free."""
        self.folder = folder
        self._limit_bytes = limit_bytes

    def open(self, source: stage_pb2.ModelSource) -> CachedModel:
        """Lease the entry of a model; the caller closes it. Raises InvalidRequest, NotEnoughSpace, NotReady."""
        names = [PurePosixPath(file.path).name for file in source.files]
        if not names or len(set(names)) != len(names) or not all(map(_is_plain, names)):
            raise InvalidRequest(f"the files of {source.model!r} have no plain names of their own")
        own, sizes = self.folder / _entry_name(source, names), [file.size_bytes for file in source.files]
        with self._lock():
            return self._with_room(own, lambda: CachedModel(own, names, sizes))

    def claim(self, entry: CachedModel, wanted: Mapping[int, Sequence[Extent]]) -> None:
        """Keep bytes of an entry, there or not yet, for as long as it is leased. Raises NotEnoughSpace, NotReady."""
        with self._lock():
            self._with_room(entry.folder, lambda: entry.claim(wanted))

    def reserve(self, entry: CachedModel, missing_bytes: int) -> None:
        """Make room for bytes that will be fetched into an entry.

        Other entries go, the least recently used first, then what no stage claims of this one. What somebody leases
        stays. Raises NotEnoughSpace, NotReady.
        """
        with self._lock():
            own = _allocated_bytes(entry.folder) + missing_bytes
            others = self._others(entry.folder)
            taken = sum(held.nbytes for held in others)
            allocated = _allocated_bytes(entry.folder) + sum(_allocated_bytes(held.folder) for held in others)
            free = shutil.disk_usage(self.folder).free
            limit = self._limit_bytes or int((allocated + free) * (1 - _FREE_SHARE))
            limit = min(limit, allocated + free)
            for held in others:
                if own + taken <= limit:
                    break
                if not held.leased and self._remove(held.folder):
                    taken -= held.nbytes
            if own + taken > limit:
                own -= entry.trim()
            if own + taken > limit:
                raise NotEnoughSpace(
                    f"the cache in {self.folder} has no room: the model takes {own} bytes, models in use {taken}, "
                    f"and it may have {limit}; give the worker more with --cache-bytes or another --cache-dir"
                )
            self._with_room(entry.folder, lambda: entry.reserve(own))

    def _with_room(self, own: Path, write: Callable[[], T]) -> T:
        """Writes into an entry. On a disk that is full, whoever filled it, first the others go that nobody leases."""
        while True:
            try:
                return write()
            except NotEnoughSpace:
                if not any(self._remove(held.folder) for held in self._others(own) if not held.leased):
                    raise

    def nbytes(self) -> int:
        """What all entries take on the disk now."""
        try:
            return sum(map(_allocated_bytes, self._entries()))
        except OSError:
            return 0

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Raises NotReady when the folder cannot be used."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK)
        except OSError as error:
            raise NotReady(f"the cache in {self.folder} cannot be written: {error.strerror}") from error
        with lock:
            lock.own()
            yield

    def _entries(self) -> Iterator[Path]:
        for path in self.folder.iterdir():
            if path.name.startswith(f"{_VERSION}-") and path.is_dir() and not path.is_symlink():
                yield path

    def _others(self, own: Path) -> list[_Held]:
        """The other entries, the least recently used first."""
        return sorted(self._look(own), key=lambda held: held.used_at)

    def _look(self, own: Path) -> Iterator[_Held]:
        for folder in self._entries():
            if folder == own:
                continue
            try:
                with FileLock(folder / LEASE) as lease:
                    leased = not lease.try_own()
                    used_at = (folder / LEASE).stat().st_mtime
            except OSError:
                leased, used_at = False, 0.0
            nbytes = _allocated_bytes(folder)
            yield _Held(folder, max(nbytes, _reserved_bytes(folder)) if leased else nbytes, used_at, leased)

    def _remove(self, folder: Path) -> bool:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning("event=cache_entry_stays folder=%s error=%r", folder, error.strerror)
            return False
        log.info("event=cache_entry_removed folder=%s", folder)
        return True


def _entry_name(source: stage_pb2.ModelSource, names: list[str]) -> str:
    """The same for the same files on whatever data worker; another for files that differ in anything that is known."""
    digest = hashlib.sha256(source.header_sha256)
    for name, file in zip(names, source.files, strict=True):
        digest.update(b"\0%s\0%d\0%s" % (name.encode(), file.size_bytes, file.sha256))
    return f"{_VERSION}-{digest.hexdigest()[:40]}"


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and name.isprintable() and len(name.encode()) <= 255


def _allocated_bytes(folder: Path) -> int:
    """Blocks of the disk: holes take none."""
    try:
        return sum(file.stat().st_blocks * 512 for file in os.scandir(folder / DATA))
    except OSError:
        return 0


def _reserved_bytes(folder: Path) -> int:
    try:
        text = (folder / RESERVED).read_text()
    except OSError:
        return 0
    return int(text) if text.isascii() and text.isdigit() else 0
