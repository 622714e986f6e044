"""Connections to other nodes: mutual TLS, limits, deadlines, and errors that come back as what they were."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from eldric import errors
from eldric.errors import EldricError
from eldric.names import server_name
from eldric.unreachable import unreachable

if TYPE_CHECKING:
    from eldric.security.certificates import Identity

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
#: Deadline of a unary call that names none.
DEFAULT_TIMEOUT_S = 30.0
#: Timeout of a unary call that takes as long as it must. A peer that is gone ends it all the same (keepalive).
NO_DEADLINE_S = 365 * 24 * 3600.0

#: The task of gRPC that lives as long as a call does, and the longest wait for those of cancelled calls, in seconds.
_STATUS_TASK = "_AioCall._handle_status_once_received"
_PUT_AWAY_S = 0.25

#: Trailing metadata of a failed call: the error's class, and when to try again.
ERROR_KEY = "eldric-error"
RETRY_KEY = "retry-after-ms"

#: No message is compressed: gRPC holds a message's length against its bound before it unpacks it, and a few kilobytes
#: may unpack to gigabytes. Calls and answers that say they are compressed fail.
UNCOMPRESSED: list[tuple[str, Any]] = [("grpc.compression_enabled_algorithms_bitset", 1)]

OPTIONS: list[tuple[str, Any]] = [
    *UNCOMPRESSED,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # of a keepalive as well: gRPC alone would wait for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),  # nodes reach each other directly, whatever the environment says
]


def channel(address: str, identity: Identity, kind: str, name: str | None = None) -> grpc.aio.Channel:
    """A connection to the node of `kind` (and, if given, of this very `name`) at "host:port", made when first used.

    Both ends show their certificates; a server of another kind or name is refused. Unary calls without a timeout get
    DEFAULT_TIMEOUT_S. Close it, or use it in `async with`.
    """
    options = _options(kind, name)
    return grpc.aio.secure_channel(address, _credentials(identity), options, interceptors=[_AsyncDeadline()])


def sync_channel(address: str, identity: Identity, kind: str, name: str | None = None) -> grpc.Channel:
    """Like `channel`, for code without an event loop."""
    made = grpc.secure_channel(address, _credentials(identity), _options(kind, name))
    return grpc.intercept_channel(made, _Deadline())


def _options(kind: str, name: str | None) -> list[tuple[str, Any]]:
    return [*OPTIONS, ("grpc.ssl_target_name_override", server_name(kind, name))]


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.authority_pem, identity.key_pem, identity.certificate_pem)


class ChannelPool:
    """One connection per peer, kept over calls and made anew after the node's certificate was renewed."""

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity
        self._channels: dict[tuple[str, str, str | None], tuple[Identity, grpc.aio.Channel]] = {}
        self._retired: list[grpc.aio.Channel] = []

    def to(self, address: str, kind: str, name: str | None = None) -> grpc.aio.Channel:
        """The connection to a peer; see `channel`. The pool closes it."""
        key, identity = (address, kind, name), self._identity()
        known = self._channels.get(key)
        if known is not None and known[0] is identity:
            return known[1]
        if known is not None:
            self._retired.append(known[1])  # its calls go on; a new certificate comes about once in twenty days
        made = channel(address, identity, kind, name)
        self._channels[key] = (identity, made)
        return made

    async def forget(self, address: str) -> None:
        """Closes the connections to a peer that is gone, and ends their calls."""
        for key in [key for key in self._channels if key[0] == address]:
            await self._channels.pop(key)[1].close()

    async def close(self) -> None:
        channels = [*self._retired, *(made for _, made in self._channels.values())]
        self._retired, self._channels = [], {}
        for made in channels:
            await made.close()
        if channels:
            await _calls_put_away()


async def _calls_put_away() -> None:
    """Returns when gRPC has done with calls that were cancelled, so that the loop may be closed.

    Each call has a task that ends with what the core says last of it. A loop that is closed before that gets the core's
    word too late, and gRPC logs "Event loop is closed" from whichever other loop there is by then. A task does not say
    whose call it is of: those of other pools that still run are waited for in vain, hence the bound.
    """
    tasks = [each for each in asyncio.all_tasks() if getattr(each.get_coro(), "__qualname__", "") == _STATUS_TASK]
    if tasks:
        await asyncio.wait(tasks, timeout=_PUT_AWAY_S)


@contextlib.contextmanager
def call_errors(peer: str = "the peer") -> Iterator[None]:
    """Turns grpc.RpcError into the EldricError that the peer raised; `peer` names it when it cannot be reached."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error, peer) from None


def error_from_rpc(error: grpc.RpcError, peer: str = "the peer") -> EldricError:
    """The EldricError for a failed call, by the class that the peer named, or by its status."""
    code, details = error.code(), error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    metadata = {str(key): value for key, value in trailing}
    known = _CLASSES.get(str(metadata.get(ERROR_KEY)))
    if known is not None and known.status == code.name:
        if known is errors.QueueIsFull:
            return errors.QueueIsFull(details, _milliseconds(metadata.get(RETRY_KEY)) / 1000)
        return known(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and RETRY_KEY in metadata:
        return errors.QueueIsFull(details, _milliseconds(metadata[RETRY_KEY]) / 1000)
    if code is grpc.StatusCode.UNAVAILABLE and ERROR_KEY not in metadata:
        return errors.Unavailable(f"{peer} cannot be reached ({unreachable(details, peer)})")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and ERROR_KEY not in metadata:
        return errors.DeadlineExceeded(f"{peer} did not answer in time")
    return _BY_STATUS.get(code.name, EldricError)(details or f"{peer} failed with {code.name}")


def _milliseconds(value: object) -> float:
    try:
        return max(0.0, float(str(value)))
    except ValueError:
        return 1000.0


_CLASSES: dict[str, type[EldricError]] = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, EldricError)
}

_BY_STATUS: dict[str, type[EldricError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "OUT_OF_RANGE": errors.InvalidRequest,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "RESOURCE_EXHAUSTED": errors.NotEnoughMemory,
    "FAILED_PRECONDITION": errors.NotReady,
    "UNIMPLEMENTED": errors.VersionMismatch,
    "ABORTED": errors.Unavailable,
    "CANCELLED": errors.Unavailable,
    "UNAVAILABLE": errors.Unavailable,
    "DATA_LOSS": errors.DataLoss,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
}


class _AsyncDeadline(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        if details.timeout is None:
            details = details._replace(timeout=DEFAULT_TIMEOUT_S)
        return await continuation(details, request)


class _Deadline(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_CallDetails(details) if details.timeout is None else details, request)


class _CallDetails(grpc.ClientCallDetails):
    def __init__(self, details: Any) -> None:
        self.method, self.timeout, self.metadata = details.method, DEFAULT_TIMEOUT_S, details.metadata
        self.credentials, self.wait_for_ready = details.credentials, details.wait_for_ready
        self.compression = details.compression
