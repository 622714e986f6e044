"""A read-only mount of an NFS export through FUSE, for kernels without an NFS client.

Pages come into the kernel's page cache, so that mappings work, and stay there while the file does not change. Never
with direct_io: it has no shared mappings, and every reader would fetch all bytes again.
"""

import errno
import itertools
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mfusepy

from eldric.errors import NotReady, Unavailable
from eldric.nfs.address import NfsAddress
from eldric.nfs.remote import OpenFile, Remote

#: Type of the mount in /proc/self/mountinfo is "fuse.NAME".
SUBTYPE = "eldric-nfs"

#: What libfuse's main says when a signal ended its loop.
_LOOP_ENDED = 8

_KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}


class NfsFiles(mfusepy.Operations):  # type: ignore[misc]
    """What FUSE asks for. OSError becomes the errno that the reader gets."""

    use_ns = True

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._numbers = itertools.count(1)
        self._open: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == "/":  # of its own: some servers refuse it to clients, and the mount must stay a folder without them
            return {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2}
        info = self._remote.stat(path)
        return {
            "st_mode": _KINDS.get(info.type.value, stat.S_IFREG) | (info.mode & 0o555),
            "st_nlink": info.nlink,
            "st_size": info.size,
            "st_blocks": -(-info.used // 512),
            "st_uid": info.uid,
            "st_gid": info.gid,
            "st_atime": info.atime,
            "st_mtime": info.mtime,
            "st_ctime": info.ctime,
        }

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        yield from (".", "..", *self._remote.listdir(path))

    def open(self, path: str, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "read-only", path)
        opened = self._remote.open(path)
        with self._lock:
            number = next(self._numbers)
            self._open[number] = opened
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._remote.read(self._open[fh], offset, size)

    def release(self, path: str, fh: int) -> int:
        with self._lock:
            opened = self._open.pop(fh, None)
        if opened is not None:
            self._remote.release(opened)
        return 0


def serve(address: NfsAddress, folder: Path, *, others: bool = False, private: bool = False) -> None:
    """Mounts an export on a folder and serves it until a signal or an unmount ends it. For the main thread.

    others: let other users read too. private: for one worker, which ends it; others do not take it for their own.
    Raises Unavailable when the server does not answer, NotReady when FUSE cannot mount there.
    """
    try:
        remote = Remote(address)
    except OSError as error:
        raise Unavailable(error.strerror or str(error)) from error
    options: dict[str, Any] = {"allow_other": True} if others else {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # else libfuse leaves them to Python, which does not run meanwhile
    try:
        mfusepy.FUSE(
            NfsFiles(remote),
            str(folder),
            foreground=True,
            ro=True,
            fsname=f"{address}#private" if private else str(address),
            subtype=SUBTYPE,
            auto_cache=True,  # what was read stays in the page cache when the file is opened again
            **options,
        )
    except RuntimeError as error:
        if error.args == (_LOOP_ENDED,):
            return
        raise NotReady(f"FUSE cannot mount on {folder} (code {error}): see the lines above") from error
    finally:
        remote.close()
