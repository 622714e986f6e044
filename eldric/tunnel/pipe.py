"""One TCP connection at the end of a channel."""

import asyncio
import socket
from collections import deque
from typing import Any, Protocol

#: Bytes that wait for a connection to take them, beyond which no credit is given.
_WRITE_BUFFER_BYTES = 64 * 1024


class Channel(Protocol):
    """What a pipe needs of its channel."""

    def send(self, data: memoryview) -> int:
        """How many bytes were taken; the pipe's `go_on` is called when there is room for more."""

    def passed_on(self, count: int) -> None: ...

    def end(self, reason: str = "", *, abort: bool = False) -> None: ...

    def gone(self) -> None:
        """The connection is closed: the pipe needs nothing any more."""


class Pipe(asyncio.Protocol):
    """Reads its connection only as far as the channel takes it, and takes from the channel before it is connected.

    Bytes that come early wait; the channel's window bounds them.
    """

    def __init__(self, channel: Channel | None = None) -> None:
        self.channel = channel
        self._transport: Any = None
        self._early: deque[bytes] = deque()
        self._unsent = memoryview(b"")
        self._unsaid = 0  # bytes written for which the channel was not told yet
        self._full = False
        self._eof = self._peer_ended = self._over = False

    # The connection.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._over:
            transport.abort()
            return
        while self._early:
            self._write(self._early.popleft())
        if self._peer_ended:
            self._write_end()

    def data_received(self, data: bytes) -> None:
        self._unsent = memoryview(bytes(self._unsent) + data) if self._unsent else memoryview(data)
        self.go_on()

    def eof_received(self) -> bool:
        self._eof = True
        self.go_on()
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        if self.channel is not None:
            if not self._over:
                self.channel.end(str(error or "the connection closed"), abort=True)
            self.channel.gone()
        self._over = True

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._tell()

    # The channel.

    def go_on(self) -> None:
        """There may be room in the channel: send what waits."""
        if self._over or self._transport is None or self.channel is None:
            return
        if self._unsent:
            self._unsent = self._unsent[self.channel.send(self._unsent) :]
        if self._unsent:
            self._transport.pause_reading()
        elif self._eof:
            self.channel.end()
            self._close_if_done()
        else:
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Bytes from the channel."""
        if self._over:
            return
        if self._transport is None:
            self._early.append(data)
        else:
            self._write(data)

    def finish(self) -> None:
        """No more bytes come from the channel."""
        self._peer_ended = True
        if self._transport is not None and not self._over:
            self._write_end()

    def abort(self) -> None:
        """The channel is over: so is the connection."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        self._unsaid += len(data)
        self._tell()

    def _tell(self) -> None:
        if not self._full and self._unsaid and self.channel is not None:
            count, self._unsaid = self._unsaid, 0
            self.channel.passed_on(count)

    def _write_end(self) -> None:
        if not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError:  # the other end has just gone
                self._transport.abort()
                return
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._peer_ended and self._eof and not self._unsent:
            self._over = True
            self._transport.close()  # what was written goes out first
