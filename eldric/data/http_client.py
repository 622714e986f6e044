"""HTTP requests of a data worker: bounded answers, deadlines, and connections that another thread can end."""

import contextlib
import json
import socket
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from eldric.errors import DataLoss, EldricError, NotFound, NotReady, PermissionDenied, Unavailable
from eldric.names import is_near

#: Longest wait for a connection, and for the next bytes of an answer, in seconds.
TIMEOUT = httpx2.Timeout(10.0, connect=10.0, read=20.0)
#: Longest JSON document that is read: block sums of some terabytes.
MAX_JSON_BYTES = 64 << 20
_MAX_ERROR_BYTES = 1 << 16

#: Status codes that may be another one in a moment.
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})


class Hangup:
    """Ends the connections of one job from another thread: what waits there fails at once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._ended = False

    def end(self) -> None:
        """For ever: connections that are made later end too."""
        with self._lock:
            self._ended = True
            for each in self._sockets:
                _shut(each)

    @property
    def extensions(self) -> Mapping[str, Any]:
        """What a request must carry, so that its connection can be ended."""
        return {"trace": self._trace}

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpcore with what it does: keeps the socket of each connection that was made."""
        stream = info.get("return_value")
        if not event.endswith((".connect_tcp.complete", ".start_tls.complete")) or stream is None:
            return
        found = stream.get_extra_info("socket")
        with self._lock:
            self._sockets.add(found)
            if self._ended:
                _shut(found)


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(each, socket.SHUT_RDWR)  # below TLS, whose state belongs to the thread that reads


def get_json(client: httpx2.Client, url: str, peer: str, extensions: Mapping[str, Any]) -> Any:
    """A document that is at most MAX_JSON_BYTES long. peer: who answers, for messages.

    Raises NotFound, PermissionDenied, NotReady, Unavailable, DataLoss.
    """
    try:
        with client.stream("GET", url, extensions=dict(extensions)) as response:
            if response.status_code != 200:
                raise error_of(response, peer)
            if is_encoded(response):
                raise DataLoss(f"{peer} answers packed, though it was asked not to")
            data = bytearray()
            for piece in response.iter_raw():
                data += piece
                if len(data) > MAX_JSON_BYTES:
                    raise DataLoss(f"{peer} answers without end")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise Unavailable(f"{peer} does not answer: {reason(error)}") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"{peer} answers what is not JSON: {str(error)[:100]}") from None


def is_encoded(response: httpx2.Response) -> bool:
    """Whether an answer is packed: a little of it may unpack to more than there is memory."""
    return str(response.headers.get("content-encoding", "identity")) != "identity"


def redirect_check(origin: str, peer: str) -> Callable[[httpx2.Request], None]:
    """A request hook for a client of the server at `origin`, a URL: it may send us to other hosts, but not from HTTPS
    to anything else, nor to what only this machine or its network segment has. The hook raises DataLoss.
    """
    first = httpx2.URL(origin)
    begins_near = _is_near(first.host)

    def check(request: httpx2.Request) -> None:
        url = request.url
        if first.scheme == "https" and url.scheme != "https":
            raise DataLoss(f"{peer} sends us to {url.scheme}://{url.host}, away from HTTPS")
        if not begins_near and _is_near(url.host):
            raise DataLoss(f"{peer} sends us to {url.host}, an address of this machine or its network segment")

    return check


def _is_near(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # a proxy may know it, or nobody does
    return any(is_near(str(each[4][0]).partition("%")[0]) for each in found)


def error_of(response: httpx2.Response, peer: str) -> EldricError:
    """What an answer other than success means. Reads a little of its body."""
    status, said = response.status_code, _said(response)
    if status in (401, 403):
        return PermissionDenied(f"{peer} does not give this to us (it answers {status}{said})")
    if status in (404, 410):
        return NotFound(f"{peer} has no {response.url.path}{said}")
    kind = NotReady if status == 412 else Unavailable
    return kind(f"{peer} answers {status} to {response.url.path}{said}")


def _said(response: httpx2.Response) -> str:
    """The reason that an error's JSON body gives: {"error": "text"} or {"error": {"message": "text"}}."""
    data = b""
    if is_encoded(response):
        return ""
    try:
        for piece in response.iter_raw():
            data += piece
            if len(data) > _MAX_ERROR_BYTES:
                return ""
        said = json.loads(data)["error"]
        text = said["message"] if isinstance(said, dict) else said
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {' '.join(text.split())[:300]}" if isinstance(text, str) else ""


def reason(error: Exception) -> str:
    """In a few words what was wrong with a connection."""
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
