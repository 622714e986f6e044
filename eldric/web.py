"""The HTTP server of a node: uvicorn in the node's own event loop, on a socket that is bound beforehand."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from eldric.accepting import ONE_AT_A_TIME, queueing
from eldric.errors import AddressInUse, InvalidRequest
from eldric.names import join_address
from eldric.security.access import Caller, caller_from_names

#: Largest request line and headers, in bytes.
MAX_HEAD_BYTES = 64 * 1024
#: Time for connections to close in an orderly way when the server ends, in seconds.
LINGER_S = 0.4
#: Longest time for a connection to show its certificate, in seconds.
HANDSHAKE_S = 10.0
#: A request's line and headers must be here within this time from the connection, or from their first byte, in seconds.
HEAD_TIMEOUT_S = 30.0


def bind(host: str, port: int, option: str) -> socket.socket:
    """A bound TCP socket; port 0 picks a free one. `option` is how a user chooses another port.

    Raises AddressInUse, or InvalidRequest when this machine has no such address or forbids the port.
    """
    where = join_address(host, port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {where}: {error.strerror}") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{where} is in use by another process: choose another port with {option} (0 picks a free one)"
            ) from None
        raise InvalidRequest(f"cannot listen on {where}: {error.strerror} (choose another with {option})") from None
    return made


def check_free(host: str, port: int, option: str) -> None:
    """Raises like `bind` when nothing could listen there now."""
    if port:
        with contextlib.closing(bind(host, port, option)) as probe:
            try:
                probe.listen(1)  # Linux lets two sockets bind with SO_REUSEADDR until one listens
            except OSError:
                raise AddressInUse(
                    f"{join_address(host, port)} is in use by another process: "
                    f"choose another port with {option} (0 picks a free one)"
                ) from None


def http_caller(scope: Any) -> Caller | None:
    """The certificate that the other end of a request's connection showed; `scope` is an ASGI scope or a Request."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    return caller


class _Protocol(H11Protocol):
    """Tells the application whose certificate was shown, which ASGI has no word for, and hangs up on a client that
    says nothing, or half of what it has to say."""

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert() if connection is not None else None
        names = (value for _, value in (certificate or {}).get("subjectAltName", ()))
        self.app_state = {**self.app_state, "caller": caller_from_names(names)}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_awaiting()

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_awaiting()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_awaiting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None


def _has_two_lengths(scope: Scope) -> bool:
    """Whether a request says in two ways how long its body is (RFC 9112, 6.1)."""
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope.get("headers", ())}


async def _two_lengths(scope: Scope, receive: Receive, send: Send) -> None:
    """Where one body ends and the next request begins, a proxy in front may see otherwise: nothing more is read."""
    answer = PlainTextResponse(
        "A body has one length: Content-Length or Transfer-Encoding.\n", 400, {"connection": "close"}
    )
    await answer(scope, receive, send)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        for each in sockets or []:  # by ourselves: uvicorn would let a client take a minute for its handshake
            self.servers.append(await self._listen(each))
        self.ready.set()

    async def _listen(self, bound: socket.socket) -> asyncio.Server:
        config, tls = self.config, self.config.ssl
        server = await asyncio.get_running_loop().create_server(
            lambda: _Protocol(config, self.server_state, self.lifespan.state),
            sock=bound,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_S if tls is not None else None,
            backlog=ONE_AT_A_TIME,
        )
        return queueing(server, config.backlog)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the node's business


class WebServer:
    """Serves an ASGI application on a bound socket, over TLS when there is a context."""

    def __init__(self, app: ASGIApp, bound: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._app = app
        self._socket = bound
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = _Server(
            uvicorn.Config(
                self._count,
                http=_Protocol,
                interface="asgi3",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                ssl_context_factory=(lambda config, default: tls) if tls is not None else None,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._requests += 1
        self._idle.clear()
        try:
            await (_two_lengths if _has_two_lengths(scope) else self._app)(scope, receive, send)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        ready = asyncio.create_task(self._server.ready.wait())
        await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()  # raises why it could not start

    async def stop(self, grace_s: float) -> None:
        """Gives requests that run `grace_s` seconds, then cancels them and closes every connection."""
        task, self._task = self._task, None
        if task is None:
            self._socket.close()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        self._server.should_exit = True
        await asyncio.wait({task}, timeout=LINGER_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # a client that keeps it open without reading answers no TLS farewell
        await task
