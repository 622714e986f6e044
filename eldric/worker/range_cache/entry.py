"""One model of the cache: its files, sparse, and a note of which bytes are there.

FOLDER/
    data/NAME       each file at its full length; what was not fetched is a hole
    extents.json    which bytes are there: written, and on the disk, after those bytes are
    lease           shared by every stage that reads the files or fetches into them
    fetch           owned by who fetches: others wait, and find the bytes there
    claims/         what each stage maps: the rest can be given back
    note            owned while extents.json is changed
    reserved        bytes that the entry will have when the fetch that runs is done
"""

import errno
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eldric.errors import NotEnoughSpace, NotReady
from eldric.worker.range_cache.claims import Claim, claimed, disk_bytes, punch
from eldric.worker.range_cache.extents import Extent, Extents
from eldric.worker.range_cache.locks import FileLock, owned

DATA, EXTENTS, LEASE, FETCH, NOTE, RESERVED = "data", "extents.json", "lease", "fetch", "note", "reserved"
_VERSION = 1
_MAX_NOTE_BYTES = 1 << 26


class CachedModel:
    """A model's entry, leased: it stays until close. Thread-safe.

    paths, sizes: of the files, in the order of the split set.
    """

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Makes what is not there. Whoever calls holds the cache's lock.

        Raises NotEnoughSpace when the disk is full, NotReady when it cannot be written.
        """
        self.folder = folder
        self.paths = tuple(folder / DATA / name for name in names)
        self.sizes = tuple(sizes)
        self._fds: list[int] = []
        #: A file takes one write at a time: in the kernel others would wait by spinning.
        self._writing = [threading.Lock() for _ in sizes]
        self._claims: list[Claim] = []
        try:
            (folder / DATA).mkdir(parents=True, exist_ok=True)
            self._lease = FileLock(folder / LEASE)
            self._lease.share()
            fresh = [self._open(path, size) for path, size in zip(self.paths, sizes, strict=True)]
            for number, is_fresh in enumerate(fresh):
                if is_fresh:
                    self.forget(number, Extent(0, sizes[number]))
            os.utime(folder / LEASE)  # the time of last use
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    def _open(self, path: Path, size: int) -> bool:
        """Whether the file was made now, or was of another size."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._fds.append(fd)
        if os.fstat(fd).st_size == size:
            return False
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        return True

    def have(self) -> list[Extents]:
        """What is there of each file. A note that cannot be read counts as none: its bytes are fetched again."""
        try:
            with (self.folder / EXTENTS).open("rb") as file:
                document = json.loads(file.read(_MAX_NOTE_BYTES))
            if document["version"] != _VERSION or len(document["files"]) != len(self.sizes):
                raise ValueError
            return [
                Extents.from_lists(extents, size) for extents, size in zip(document["files"], self.sizes, strict=True)
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return [Extents() for _ in self.sizes]

    def add(self, extents: Mapping[int, Sequence[Extent]]) -> None:
        """Note that bytes are there, once they are on the disk. Raises NotEnoughSpace, NotReady."""
        try:
            for number in extents:
                os.fdatasync(self._fds[number])
            self._change(lambda number, known: known.union(extents.get(number, ())))
        except OSError as error:
            raise self._failed(error) from error

    def forget(self, file: int, extent: Extent) -> None:
        """Note that bytes are not there, or not to be trusted. Raises OSError."""
        self._change(lambda number, known: known.without(extent) if number == file else known)

    def _change(self, change: Callable[[int, Extents], Extents]) -> None:
        with owned(self.folder / NOTE):
            files = [change(number, known).as_lists() for number, known in enumerate(self.have())]
            draft = self.folder / f".{EXTENTS}.tmp"
            with draft.open("w") as file:
                json.dump({"version": _VERSION, "files": files}, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.folder / EXTENTS)

    def claim(self, wanted: Mapping[int, Sequence[Extent]]) -> None:
        """Keep these bytes from `trim` until close. Whoever calls holds the cache's lock.

        Raises NotEnoughSpace, NotReady.
        """
        try:
            self._claims.append(Claim(self.folder, wanted))
        except OSError as error:
            raise self._failed(error) from error

    def trim(self) -> int:
        """Give back what nobody claims. Whoever calls holds the cache's lock. Returns bytes of the disk.

        Raises NotReady.
        """
        before = sum(map(disk_bytes, self._fds))
        used = claimed(self.folder, self.sizes)
        try:
            for number, known in enumerate(self.have()):
                for extent in known:
                    for unused in used[number].missing(extent):
                        self.forget(number, unused)
                        punch(self._fds[number], unused)
        except OSError as error:
            raise self._failed(error) from error
        return before - sum(map(disk_bytes, self._fds))

    def reserve(self, nbytes: int) -> None:
        """Note how much the entry will take when the fetch that runs is done. Raises NotEnoughSpace, NotReady."""
        try:
            (self.folder / RESERVED).write_text(str(nbytes))
        except OSError as error:
            raise self._failed(error) from error

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Raises NotEnoughSpace when the disk is full, NotReady when it fails."""
        try:
            with self._writing[file]:
                while data:
                    count = os.pwrite(self._fds[file], data, offset)
                    data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error

    def read(self, file: int, extent: Extent) -> bytes:
        """Bytes that are there. Raises NotReady."""
        try:
            return os.pread(self._fds[file], len(extent), extent.start)
        except OSError as error:
            raise self._failed(error, "read") from error

    def try_fetch_lock(self) -> FileLock | None:
        """The lock of who fetches into this entry, or None while somebody else has it."""
        lock = FileLock(self.folder / FETCH)
        if lock.try_own():
            return lock
        lock.close()
        return None

    def close(self) -> None:
        """Give the lease back: the entry may be removed from now on, unless others lease it too."""
        while self._claims:
            self._claims.pop().close()
        while self._fds:
            os.close(self._fds.pop())
        if hasattr(self, "_lease"):
            self._lease.close()

    def _failed(self, error: OSError, doing: str = "written") -> NotEnoughSpace | NotReady:
        where = self.folder.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NotEnoughSpace(
                f"the disk of the cache in {where} is full: make room, or give the worker another --cache-dir"
            )
        return NotReady(f"the cache in {where} cannot be {doing}: {error.strerror}")
