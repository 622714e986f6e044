"""SHA-256 of files, and copies of files, a piece at a time: memory stays flat whatever a file's size."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

#: Called with the number of bytes done since the last call. May raise, which ends the work.
Progress = Callable[[int], None]

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


def sha256_of(path: Path, progress: Progress) -> str:
    """SHA-256 of a file in lower-case hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for piece in _pieces(file):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def copy_with_sha256(source: Path, target: Path, progress: Progress) -> str:
    """Copies a file to `target`, which must not exist, and has it on the disk on return. Returns its SHA-256.

    Raises OSError.
    """
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as file, target.open("xb", buffering=0) as copy:
        for piece in _pieces(file):
            digest.update(piece)
            _write_all(copy, piece)
            progress(len(piece))
        os.fsync(copy.fileno())
    return digest.hexdigest()


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


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]
