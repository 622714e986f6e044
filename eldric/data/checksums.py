"""SHA-256 of files and of their blocks, and copies of files, a piece at a time: memory stays flat whatever a file's
size."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: Called with the number of bytes done since the last call. May raise, which ends the work.
Progress = Callable[[int], None]

#: Length of a block, the unit of what is fetched and compared. A file's last one may be shorter. Small, because a stage
#: fetches the whole of the blocks at its ranges' edges; the sums of a model of 40 GB take 1.3 MB.
BLOCK_BYTES = 1 << 20

_PIECE_BYTES = 1 << 20
#: linux/fs.h: _IOW(0x94, 9, int)
_FICLONE = 0x40049409

#: What link(2) and ioctl_ficlone(2) say where a file system, or a rule of the machine, does not allow it.
_NOT_HERE = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.EMLINK,
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EBADF,
        errno.ETXTBSY,
    }
)


@dataclass(frozen=True, slots=True)
class FileSums:
    """SHA-256 of a file, and of each of its blocks in order; lower-case hex. Both are empty when not known yet."""

    sha256: str = ""
    blocks: tuple[str, ...] = ()

    def damaged_blocks(self, now: "FileSums") -> list[int]:
        """Numbers of the blocks that are not what they were."""
        return [number for number, pair in enumerate(zip(self.blocks, now.blocks, strict=False)) if pair[0] != pair[1]]


def blocks_of(size_bytes: int) -> int:
    """How many blocks a file of this size has."""
    return -(-size_bytes // BLOCK_BYTES)


class Hasher:
    """Sums of a file that is seen once, from its beginning to its end."""

    def __init__(self) -> None:
        self._whole, self._block = hashlib.sha256(), hashlib.sha256()
        self._before = self._whole  # as it was where the newest block begins
        self._in_block = 0
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Takes the file's next bytes, however many."""
        view = memoryview(data)
        while view:
            if not self._in_block:
                self._before = self._whole.copy()
            part = view[: BLOCK_BYTES - self._in_block]
            self._whole.update(part)
            self._block.update(part)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def newest_block(self) -> str:
        """The sum of the block that bytes came to last, as far as it has come."""
        return self._block.hexdigest() if self._in_block else self._blocks[-1]

    def forget_block(self) -> None:
        """Goes back to where the newest block begins. Not twice in a row."""
        if not self._in_block:
            self._blocks.pop()
        self._whole, self._block, self._in_block = self._before, hashlib.sha256(), 0

    def sums(self) -> FileSums:
        """Of what was seen; nothing may follow."""
        if self._in_block:
            self._end_block()
        return FileSums(self._whole.hexdigest(), tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block, self._in_block = hashlib.sha256(), 0


def sums_of(path: Path, progress: Progress) -> FileSums:
    """Sums of a file. Raises OSError."""
    hasher = Hasher()
    with path.open("rb", buffering=0) as file:
        for piece in _pieces(file):
            hasher.update(piece)
            progress(len(piece))
    return hasher.sums()


def copy_with_sums(source: Path, target: Path, progress: Progress) -> FileSums:
    """Copies a file to `target`, which must not exist, and has it on the disk on return. Returns its sums.

    Raises OSError.
    """
    hasher = Hasher()
    with source.open("rb", buffering=0) as file, target.open("xb", buffering=0) as copy:
        for piece in _pieces(file):
            hasher.update(piece)
            write_all(copy, piece)
            progress(len(piece))
        os.fsync(copy.fileno())
    return hasher.sums()


def try_link(source: Path, target: Path) -> bool:
    """Makes `target` a hard link to `source`. False where that is not possible. Raises OSError for other failures."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise
    return True


def try_clone(source: Path, target: Path) -> bool:
    """Makes `target` a copy that shares its blocks with `source` until one is written (btrfs, XFS, bcachefs).

    False, and no target, where that is not possible. Raises OSError for other failures.
    """
    try:
        with source.open("rb") as file, target.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, file.fileno())
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        return False
    return True


def _pieces(file: BinaryIO) -> Iterator[memoryview]:
    """The file's bytes in order. Each piece is good until the next is asked for."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:count]


def write_all(file: BinaryIO, piece: memoryview) -> None:
    """Writes all of a piece to an unbuffered file, which may take less at once."""
    while piece:
        piece = piece[file.write(piece) :]
