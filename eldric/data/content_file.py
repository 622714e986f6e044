"""A file that is read in an event loop: what the kernel has in memory at once, the rest in a thread."""

import asyncio
import os

#: Read what needs no waiting (Linux, preadv2(2)); 0 where there is no such thing.
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)


class ContentFile:
    """One reader, from one place on. Reads like a file, but that a read is short only at the end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset = 0
        self._buffer = bytearray()

    async def seek(self, offset: int) -> None:
        self._offset = offset

    async def read(self, most_bytes: int) -> bytes:
        """Raises OSError."""
        if len(self._buffer) < most_bytes:
            self._buffer = bytearray(most_bytes)
        data = memoryview(self._buffer)[:most_bytes]
        filled = self._read_now(data)
        if filled < most_bytes:
            reading = asyncio.get_running_loop().run_in_executor(None, self._read, data, filled)
            try:
                filled = await asyncio.shield(reading)
            except asyncio.CancelledError:
                await asyncio.wait({reading})  # the descriptor may be closed only after it
                raise
        self._offset += filled
        return bytes(data[:filled])

    def close(self) -> None:
        os.close(self._fd)

    def _read_now(self, data: memoryview) -> int:
        """Bytes that were there without waiting."""
        if not _NO_WAIT:
            return 0
        try:
            return os.preadv(self._fd, [data], self._offset, _NO_WAIT)
        except OSError:  # nothing is there, or this file system cannot say: the thread finds out
            return 0

    def _read(self, data: memoryview, filled: int) -> int:
        """Goes on until it is full, or the file ends."""
        while filled < len(data) and (count := os.preadv(self._fd, [data[filled:]], self._offset + filled)):
            filled += count
        return filled
