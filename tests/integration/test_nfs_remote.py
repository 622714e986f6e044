"""Reading from a real NFS server without the kernel: many at once, and a server that stops or forgets."""

import contextlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eldric.nfs.remote import CALL_S, CONNECTIONS, RETRY_S, OpenFile, Remote
from tests.nfs import Server, exporting, need_nfs

pytestmark = pytest.mark.timeout(60)

PIECE, PIECES = 64 << 10, 160
READERS = 3 * CONNECTIONS


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    need_nfs()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_bytes(bytes(range(256)) * (PIECE * PIECES // 256))
    with exporting(tmp_path / "store") as server:
        yield server


@pytest.fixture
def remote(server: Server) -> Iterator[Remote]:
    with contextlib.closing(Remote(server.address)) as made:
        yield made


def read_all(remote: Remote, opened: OpenFile) -> list[bytes | OSError]:
    """Every piece, by many readers at once; or the error that its reader got."""

    def one(number: int) -> bytes | OSError:
        try:
            return remote.read(opened, number * PIECE, PIECE)
        except OSError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(one, range(PIECES)))


def test_many_readers_share_a_few_connections(remote: Remote) -> None:
    assert remote._made == 1
    assert read_all(remote, remote.open("/file")) == [bytes(range(256)) * (PIECE // 256)] * PIECES
    assert 1 < remote._made <= CONNECTIONS
    assert len(remote._idle) == remote._made


def test_a_file_that_nobody_reads_any_more_is_closed_on_every_connection(remote: Remote) -> None:
    first, second = remote.open("/file"), remote.open("/file")
    for opened in (first, second):
        read_all(remote, opened)
    remote.release(first)
    assert {opened for connection in remote._idle for opened in connection.files} == {second}
    assert remote.read(second, 0, 4) == b"\0\1\2\3"


def test_nobody_waits_long_for_a_server_that_stops_and_all_go_on_with_it(server: Server, remote: Remote) -> None:
    opened = remote.open("/file")
    read_all(remote, opened)
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    found = read_all(remote, opened)
    assert time.monotonic() - began < 2 * CALL_S + RETRY_S + 2
    assert all(isinstance(each, OSError) and "does not answer" in str(each) for each in found)
    server.signal(signal.SIGCONT)
    deadline = time.monotonic() + 10
    while not all(isinstance(each, bytes) for each in read_all(remote, opened)):
        assert time.monotonic() < deadline
    assert len(remote._idle) == remote._made <= CONNECTIONS


def test_a_server_that_was_started_again_is_read_from_over_new_connections(server: Server, remote: Remote) -> None:
    opened = remote.open("/file")
    read_all(remote, opened)
    server.kill()
    server.start()
    deadline = time.monotonic() + 20
    while not all(isinstance(each, bytes) for each in read_all(remote, opened)):
        assert time.monotonic() < deadline
    assert len(remote._idle) == remote._made <= CONNECTIONS


def test_another_file_in_its_place_is_not_read(server: Server, remote: Remote, tmp_path: Path) -> None:
    opened = remote.open("/file")
    (tmp_path / "other").write_bytes(b"other" * PIECE)
    (tmp_path / "other").replace(tmp_path / "store" / "file")
    found = read_all(remote, opened)
    old = bytes(range(256)) * (PIECE // 256)
    assert all(each == old or isinstance(each, OSError) for each in found), "never a piece of the other file"
