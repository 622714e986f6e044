"""Files of an NFS server, read without the kernel: every call has a deadline, and a lost server is found again.

A connection answers one call after the other, so that many small reads would wait for each other's round trips: there
are several, made when all others are busy.
"""

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
#: Connections at most: with 1 ms each way, one brings 25 to 40 MB/s in reads of 128 KiB, eight what 1 Gbit/s carries.
CONNECTIONS = 8
#: Protocol versions that are tried, best first.
VERSIONS = ("4.1", "4.0")

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class OpenFile:
    """A file that somebody reads. It is read over any connection, as long as it is the very same file."""

    path: str
    identity: tuple[int, int, int]  # file id, size in bytes, time of its last change
    is_released: bool = False


@dataclass(slots=True, eq=False)
class _Connection:
    """Used by one thread at a time."""

    client: nfs_rs.Client
    generation: int
    files: dict[OpenFile, nfs_rs.File] = field(default_factory=dict)

    def open(self, path: str) -> OpenFile:
        opened = OpenFile(path, _identity(self.client.stat(path)))
        self.files[opened] = self.client.open(path, "rb")
        return opened

    def file(self, opened: OpenFile) -> nfs_rs.File:
        file = self.files.get(opened)
        if file is None:
            if _identity(self.client.stat(opened.path)) != opened.identity:
                raise OSError(errno.ESTALE, "another file is in its place on the server", opened.path)
            file = self.files[opened] = self.client.open(opened.path, "rb")
        return file

    def close_released(self) -> None:
        """Raises NfsError."""
        for opened in [each for each in self.files if each.is_released]:
            self.files.pop(opened).close()

    def close(self) -> None:
        """Says good-bye to the server, which may be gone."""
        for file in self.files.values():
            with contextlib.suppress(nfs_rs.NfsError):
                file.close()
        with contextlib.suppress(nfs_rs.NfsError):
            self.client.close()


class Remote:
    """Read-only access to an export. Thread-safe. Everything raises OSError: EIO for a server that does not answer."""

    def __init__(self, address: NfsAddress) -> None:
        """Connects to the server. Raises OSError."""
        self.address = address
        self._changed = threading.Condition()
        self._idle: list[_Connection] = []
        self._made = 0  # connections that there are, or are being made
        self._generation = 0  # grows when the connections there are turn out to be of no use
        self._silent_until = float("-inf")
        self._give_back(self._take())

    def stat(self, path: str) -> nfs_rs.FileInfo:
        return self._call(lambda connection: connection.client.stat(path))

    def listdir(self, path: str) -> list[str]:
        return self._call(lambda connection: connection.client.listdir(path))

    def open(self, path: str) -> OpenFile:
        return self._call(lambda connection: connection.open(path))

    def read(self, opened: OpenFile, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the file's end."""

        def attempt(connection: _Connection) -> bytes:
            file = connection.file(opened)
            pieces, at, end = [], offset, min(offset + length, opened.identity[1])
            while at < end:
                piece = file.read_at(at, end - at)
                if not piece:
                    raise OSError(errno.ESTALE, "the file was cut on the server", opened.path)
                pieces.append(piece)
                at += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

        return self._call(attempt)

    def release(self, opened: OpenFile) -> None:
        """Nobody reads it any more: it is closed wherever it is open."""
        opened.is_released = True
        with self._changed:
            idle = [each for each in self._idle if opened in each.files]
            self._idle = [each for each in self._idle if opened not in each.files]
        for connection in idle:
            self._give_back(connection)

    def close(self) -> None:
        """Says good-bye to the server; one that does not answer is not waited for."""
        with self._changed:
            idle, self._idle = self._idle, []
        leaving = [_leave(each) for each in idle]
        end = time.monotonic() + CLOSE_S
        for thread in leaving:
            thread.join(max(0.0, end - time.monotonic()))

    def _call(self, attempt: Callable[[_Connection], T]) -> T:
        """Once, and a second time over a new connection if the server forgot the first one."""
        for last in (False, True):
            connection = self._take()
            try:
                return attempt(connection)
            except nfs_rs.NfsTimeoutError as error:
                self._fall_silent()
                raise OSError(errno.EIO, f"{self.address} does not answer") from error
            except nfs_rs.NfsError as error:
                if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
                    raise
                self._give_up(connection.generation)
                if last:
                    raise OSError(errno.EIO, f"{self.address}: {error}") from error
            finally:
                self._give_back(connection)
        raise AssertionError("unreachable")

    def _take(self) -> _Connection:
        """A connection that nobody uses: one that there is, or a new one. Raises OSError."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._made < CONNECTIONS or self._is_silent())
            if self._is_silent():
                raise OSError(errno.EIO, f"{self.address} does not answer")
            if self._idle:
                return self._idle.pop()
            self._made += 1
            generation = self._generation
        try:
            return _Connection(_connect(self.address), generation)
        except BaseException as error:
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
            if not isinstance(error, nfs_rs.NfsError):
                raise
            self._fall_silent()
            raise OSError(errno.EIO, f"{self.address}: {error}") from error

    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until

    def _fall_silent(self) -> None:
        """Whoever waits for a connection need not wait for an answer too."""
        with self._changed:
            self._silent_until = time.monotonic() + RETRY_S
            self._changed.notify_all()

    def _give_back(self, connection: _Connection) -> None:
        if not self._is_silent():
            try:
                connection.close_released()
            except nfs_rs.NfsError:
                self._give_up(connection.generation)
        with self._changed:
            is_good = connection.generation == self._generation
            if is_good:
                self._idle.append(connection)
            else:
                self._made -= 1
            self._changed.notify_all()
        if not is_good:
            _leave(connection)

    def _give_up(self, generation: int) -> None:
        """The connections of this generation are of no use any more, unless somebody found that out already."""
        with self._changed:
            if self._generation != generation:
                return
            self._generation += 1
            idle, self._idle = self._idle, []
            self._made -= len(idle)
            self._changed.notify_all()
        for connection in idle:
            _leave(connection)


def _connect(address: NfsAddress) -> nfs_rs.Client:
    return nfs_rs.Client.connect(
        f"nfs://{join_address(address.host, address.port).rpartition(':')[0]}{quote(address.path)}",
        versions=VERSIONS,
        nfs_port=address.port,
        noresvport=os.geteuid() != 0,  # a server may trust only ports that root can bind
        connect_timeout=CONNECT_S,
        operation_timeout=CALL_S,
    )


def _leave(connection: _Connection) -> threading.Thread:
    """Close a connection in a thread of its own: the server may not answer."""
    thread = threading.Thread(target=connection.close, daemon=True)
    thread.start()
    return thread


def _identity(info: nfs_rs.FileInfo) -> tuple[int, int, int]:
    return info.fileid, info.size, info.mtime
