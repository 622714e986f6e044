"""The process that touches files on a mount that may hang. Started as a script, with the standard library alone.

The first line of its input is a request, a JSON object; its first line of output, "{}", says that it has it. Then its
answers are lines, a failure one with an object {"errno", "message"}. It ends with its input, and can be killed at any
time without harm.

    look   {"files": [[path, header bytes], ...]}   -> {"sizes": [...], "sha256": of the first file's header}
    read   {"files": [path, ...], "ranges": [[file, offset, length], ...], "window": bytes}
           -> bytes read so far, again and again; stops when it is a window ahead of what its input says is used up
    probe  {}, then a path a line -> [device, inode, size, time of change in ns] of that file, when a byte of it came
           from the server
"""

import hashlib
import io
import json
import mmap
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

_PIECE_BYTES = 1 << 20
_AHEAD = 4  # pieces, of which all bytes are asked for before they are waited for
_ASKED_BYTES = 128 << 10  # at a time: the kernel brings no more of what is asked for at once, by default
_PAGE = mmap.PAGESIZE
_INPUT, _OUTPUT = 0, 1


def look(files: list[list[Any]]) -> dict[str, Any]:
    """Sizes of the files, with their headers brought into the page cache; SHA-256 of the first one's."""
    sizes, digest = [], ""
    for path, header_bytes in files:
        descriptor = _open(path)
        sizes.append(os.fstat(descriptor).st_size)
        header = hashlib.sha256()
        for piece in _pieces(descriptor, 0, min(header_bytes, sizes[-1])):
            header.update(piece)
        digest = digest or header.hexdigest()
        os.close(descriptor)
    return {"sizes": sizes, "sha256": digest}


def read(files: list[str], ranges: list[list[int]], window: int) -> None:
    """Bring ranges into the page cache, exactly their pages, in their order."""
    descriptors = [_open(path) for path in files]
    done, used = 0, _Used()
    for file, offset, length in ranges:
        for piece in _pieces(descriptors[file], offset, length):
            done += len(piece)
            _say(str(done))
            used.wait_for(done - window)


def probe(path: str, block: mmap.mmap) -> list[int]:
    """Read from the server itself, whatever the page cache holds."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not every file system has O_DIRECT
    try:
        os.posix_fadvise(descriptor, 0, _PAGE, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [block], 0)
        status = os.fstat(descriptor)
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    finally:
        os.close(descriptor)


class _Used:
    """What the reader of the page cache has used up, as it says on our input."""

    def __init__(self) -> None:
        self._bytes, self._rest = 0, b""

    def wait_for(self, wanted: int) -> None:
        while self._bytes < wanted or select.select([_INPUT], [], [], 0)[0]:
            data = os.read(_INPUT, 1 << 16)
            if not data:
                sys.exit(0)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._bytes = int(lines[-1]) if lines else self._bytes


def _open(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: it would bring pages of others' shards
    return descriptor


def _pieces(descriptor: int, offset: int, length: int) -> Iterator[memoryview]:
    """The bytes of a range, piece by piece; the next pieces are under way meanwhile. Raises OSError."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    end, asked = offset + length, offset
    while offset < end:
        while asked < min(end, offset + _AHEAD * _PIECE_BYTES):
            step = min(_ASKED_BYTES - asked % _ASKED_BYTES, end - asked)
            os.posix_fadvise(descriptor, asked, step, os.POSIX_FADV_WILLNEED)
            asked += step
        size = min(_PIECE_BYTES - offset % _PIECE_BYTES, end - offset)
        count = os.preadv(descriptor, [buffer[:size]], offset)
        if not count:
            raise OSError(0, "the file was cut while it was read")
        yield buffer[:count]
        offset += count


def _say(line: str) -> None:
    os.write(_OUTPUT, f"{line}\n".encode())


def main(mode: str) -> None:
    lines = io.FileIO(_INPUT, closefd=False)  # unbuffered: `read` waits for its input itself
    request = json.loads(lines.readline())
    _say("{}")
    try:
        if mode == "look":
            _say(json.dumps(look(request["files"])))
        elif mode == "read":
            read(request["files"], request["ranges"], request["window"])
            lines.read()  # its end says that all was used
        else:
            _probe_for_ever(lines)
    except OSError as error:
        _say(_failure(error))


def _probe_for_ever(lines: Any) -> None:
    block = mmap.mmap(-1, _PAGE)
    while path := lines.readline():
        try:
            _say(json.dumps(probe(os.fsdecode(path[:-1]), block)))
        except OSError as error:
            _say(_failure(error))


def _failure(error: OSError) -> str:
    return json.dumps({"errno": error.errno or 0, "message": error.strerror or str(error)})


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
