"""Files of an NFS server, read without the kernel: every call has a deadline, and a lost server is found again."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

import nfs_rs

from eldric.names import join_address
from eldric.nfs.address import NfsAddress

#: Longest wait for one answer of the server, and for a connection, in seconds.
CALL_S = 2.0
CONNECT_S = 2.0
CLOSE_S = 0.5
#: After a call that got no answer, others fail at once for so long, in seconds: they need not all wait.
RETRY_S = 0.5
#: Protocol versions that are tried, best first.
VERSIONS = ("4.1", "4.0")

T = TypeVar("T")


@dataclass(slots=True)
class OpenFile:
    """A file that somebody reads. It goes on after a reconnection only if it is the very same file."""

    path: str
    identity: tuple[int, int, int]  # file id, size in bytes, time of its last change
    file: nfs_rs.File
    generation: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Remote:
    """Read-only access to an export. Thread-safe. Everything raises OSError: EIO for a server that does not answer."""

    def __init__(self, address: NfsAddress) -> None:
        """Connects to the server. Raises OSError."""
        self.address = address
        self._lock = threading.Lock()
        self._generation = 0
        self._silent_until = float("-inf")
        self._client: nfs_rs.Client | None = None
        self._use()

    def stat(self, path: str) -> nfs_rs.FileInfo:
        return self._call(lambda client, _: client.stat(path))

    def listdir(self, path: str) -> list[str]:
        return self._call(lambda client, _: client.listdir(path))

    def open(self, path: str) -> OpenFile:
        return self._call(lambda client, generation: _open(client, generation, path))

    def read(self, opened: OpenFile, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the file's end."""

        def attempt(client: nfs_rs.Client, generation: int) -> bytes:
            with opened.lock:
                if opened.generation != generation:
                    _open_again(opened, client, generation)
            pieces, at, end = [], offset, min(offset + length, opened.identity[1])
            while at < end:
                piece = opened.file.read_at(at, end - at)
                if not piece:
                    raise OSError(errno.ESTALE, "the file was cut on the server", opened.path)
                pieces.append(piece)
                at += len(piece)
            return b"".join(pieces)

        return self._call(attempt)

    def close(self) -> None:
        """Says good-bye to the server; one that does not answer is not waited for."""
        client, self._client = self._client, None
        if client is not None:
            leaving = threading.Thread(target=_close, args=(client,), daemon=True)
            leaving.start()
            leaving.join(CLOSE_S)

    def _call(self, attempt: Callable[[nfs_rs.Client, int], T]) -> T:
        """Once, and a second time over a new connection if the server forgot the first one."""
        for last in (False, True):
            client, generation = self._use()
            try:
                return attempt(client, generation)
            except nfs_rs.NfsTimeoutError as error:
                self._silent_until = time.monotonic() + RETRY_S
                raise OSError(errno.EIO, f"{self.address} does not answer") from error
            except nfs_rs.NfsError as error:
                if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
                    raise
                self._drop(generation)
                if last:
                    raise OSError(errno.EIO, f"{self.address}: {error}") from error
        raise AssertionError("unreachable")

    def _use(self) -> tuple[nfs_rs.Client, int]:
        with self._lock:
            if time.monotonic() < self._silent_until:
                raise OSError(errno.EIO, f"{self.address} does not answer")
            if self._client is None:
                try:
                    self._client = _connect(self.address)
                except nfs_rs.NfsError as error:
                    self._silent_until = time.monotonic() + RETRY_S
                    raise OSError(errno.EIO, f"{self.address}: {error}") from error
                self._generation += 1
            return self._client, self._generation

    def _drop(self, generation: int) -> None:
        """Give a connection up, unless somebody else did already. What others still do with it fails or ends."""
        with self._lock:
            if self._generation == generation:
                self._client = None


def _connect(address: NfsAddress) -> nfs_rs.Client:
    return nfs_rs.Client.connect(
        f"nfs://{join_address(address.host, address.port).rpartition(':')[0]}{quote(address.path)}",
        versions=VERSIONS,
        nfs_port=address.port,
        noresvport=os.geteuid() != 0,  # a server may trust only ports that root can bind
        connect_timeout=CONNECT_S,
        operation_timeout=CALL_S,
    )


def _close(client: nfs_rs.Client) -> None:
    with contextlib.suppress(nfs_rs.NfsError):
        client.close()


def _identity(info: nfs_rs.FileInfo) -> tuple[int, int, int]:
    return info.fileid, info.size, info.mtime


def _open(client: nfs_rs.Client, generation: int, path: str) -> OpenFile:
    return OpenFile(path, _identity(client.stat(path)), client.open(path, "rb"), generation)


def _open_again(opened: OpenFile, client: nfs_rs.Client, generation: int) -> None:
    if _identity(client.stat(opened.path)) != opened.identity:
        raise OSError(errno.ESTALE, "another file is in its place on the server", opened.path)
    opened.file, opened.generation = client.open(opened.path, "rb"), generation
