"""A file that is read in an event loop: the same bytes, whether the kernel has them at hand or a thread must wait."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from eldric.data import content_file
from eldric.data.content_file import ContentFile

DATA = os.urandom(300_000)
CALM = os.preadv


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(DATA)
    return made


async def read_all(file: ContentFile, size: int = 70_000) -> list[bytes]:
    pieces = []
    while piece := await file.read(size):
        pieces.append(piece)
    return pieces


def never_at_once(*arguments: object) -> int:
    if len(arguments) > 3:
        raise BlockingIOError
    return CALM(*arguments)  # type: ignore[arg-type]


def some_at_once(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
    return CALM(fd, [buffers[0][: len(buffers[0]) // 2 + 1]] if flags else buffers, offset)


@pytest.mark.parametrize("way", ["at once", "some", "in a thread", "no such flag"])
async def test_the_bytes_are_the_files_and_only_the_last_piece_is_short(
    path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "no such flag":
        monkeypatch.setattr(content_file, "_NO_WAIT", 0)
    elif way != "at once":
        monkeypatch.setattr(os, "preadv", some_at_once if way == "some" else never_at_once)
    file = ContentFile(path)
    try:
        pieces = await read_all(file)
        assert b"".join(pieces) == DATA
        assert [len(piece) for piece in pieces] == [70_000] * 4 + [20_000]
        await file.seek(299_999)
        assert await file.read(10) == DATA[-1:]
        await file.seek(5)
        assert await file.read(3) == DATA[5:8]
    finally:
        file.close()


async def test_pieces_stay_as_they_were_when_the_next_is_read(path: Path) -> None:
    file = ContentFile(path)
    first = await file.read(1000)
    await file.read(1000)
    assert first == DATA[:1000]
    file.close()


async def test_a_read_that_is_cancelled_ends_before_the_file_may_be_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if flags:
            raise BlockingIOError
        begun.set()
        go_on.wait(10)
        return CALM(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    file = ContentFile(path)
    reading = asyncio.create_task(file.read(1000))
    await asyncio.to_thread(begun.wait, 10)
    reading.cancel()
    done, _ = await asyncio.wait({reading}, timeout=0.05)
    assert not done, "the thread still reads"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    file.close()


async def test_a_file_that_is_gone_or_cannot_be_read_is_an_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ContentFile(tmp_path / "nothing")
    file = ContentFile(tmp_path)
    with pytest.raises(IsADirectoryError):
        await file.read(10)
    file.close()
