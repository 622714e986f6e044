"""One HTTPS connection to a data worker: ranges of a model's files, and the sums of their blocks.

Mutual TLS with the cluster's own certificates: the server must be this very data worker, and sees which node asks. What
it answers is checked before a byte is used: only the 206 of exactly the range that was asked for is taken.
"""

import contextlib
import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote, urlsplit

from eldric.errors import DataLoss, EldricError, InvalidRequest, NotReady, QueueIsFull, Unavailable
from eldric.json_messages import from_json
from eldric.names import server_name
from eldric.v1 import model_store_pb2, stage_pb2
from eldric.worker.range_cache.extents import Extent

#: Longest wait for a connection, and for the next bytes of an answer, in seconds.
CONNECT_S, SILENCE_S = 3.0, 10.0
#: An answer that is slower than this, after its first ten seconds, has failed: nobody may trickle.
LEAST_BYTES_PER_S = 64 << 10
#: Largest answer that is no file, in bytes: the block sums of 500 GB.
_MAX_ANSWER_BYTES = 64 << 20
_MAX_RETRY_AFTER_S = 30.0
#: Of a body, the most that is read at once, and what must have come before who waits for it is woken.
_STEP_BYTES, _WAKE_BYTES = 256 << 10, 64 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


class Connection:
    """Belongs to one thread, but for `abort`. Connects when it is used, again after a failure.

    Its calls raise Unavailable (try again), QueueIsFull (try again later), NotReady (this data worker cannot serve the
    model) or DataLoss (it answers what it was not asked for).
    """

    def __init__(self, place: stage_pb2.ModelPlace, tls: ssl.SSLContext) -> None:
        """Raises InvalidRequest when the place is no data worker's HTTPS address."""
        kind, _, name = place.node_id.partition("/")
        host, port = _https_address(place.http_url)
        if kind != "data" or not name or not host:
            raise InvalidRequest(f"{place.node_id} at {place.http_url!r:.200} is no data worker with an https address")
        self._http = _Https(host, port, tls, server_name("data", name))

    def pieces(
        self,
        source: stage_pb2.ModelSource,
        file: int,
        extent: Extent,
        lengths: Sequence[int],
        buffer: memoryview,
        moved: Callable[[], None],
    ) -> Iterator[memoryview]:
        """Read an extent of a file in pieces of these lengths, which are all of it: each in the beginning of `buffer`,
        which the next one takes. moved: called whenever something came."""
        path = f"/api/v1/models/{quote(source.model, safe='')}/content?file={file}"
        headers = {"Range": f"bytes={extent.start}-{extent.stop - 1}"}
        with self._failures():
            answer = self._answer(path, headers)
            self._check(answer, source.files[file], extent)
            yield from self._body(answer, lengths, buffer, moved)

    def blocks(self, model: str) -> model_store_pb2.ModelBlocks:
        """The sums of a model's blocks, as this data worker has them."""
        with self._failures():
            answer = self._answer(f"/api/v1/models/{quote(model, safe='')}/blocks", {"Accept": "application/json"})
            if answer.status != 200:
                raise DataLoss(f"it answers {answer.status} where block sums were asked for")
            body = bytearray()
            deadline = time.monotonic() + SILENCE_S + _MAX_ANSWER_BYTES / LEAST_BYTES_PER_S
            while piece := answer.read1(1 << 20):
                body += piece
                if len(body) > _MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    raise DataLoss("its block sums do not end")
        blocks = model_store_pb2.ModelBlocks()
        try:
            from_json(bytes(body), blocks)
        except InvalidRequest as error:
            raise DataLoss(f"its block sums cannot be read: {error.message}") from error
        return blocks

    def abort(self) -> None:
        """End what another thread waits for here."""
        if (sock := self._http.sock) is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS's own shutdown is not for two threads

    def close(self) -> None:
        self._http.close()

    def _answer(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._http.request("GET", path, headers=headers)
        answer = self._http.getresponse()
        if answer.status in (200, 206):
            return answer
        reason = _reason(answer)
        if answer.status in (429, 503):
            raise QueueIsFull(reason, _retry_after(answer))
        raise NotReady(reason)

    def _check(self, answer: http.client.HTTPResponse, file: stage_pb2.ModelFile, extent: Extent) -> None:
        etag, known = answer.getheader("etag", ""), file.sha256.hex()
        if known and etag.strip('"') != known:
            raise NotReady(f"its {file.path} is another file: it has the ETag {etag[:80]}, not {known}")
        found = _CONTENT_RANGE.fullmatch(answer.getheader("content-range", ""))
        given = tuple(int(number) for number in found.groups()) if found else ()
        if answer.status != 206 or given != (extent.start, extent.stop - 1, file.size_bytes):
            raise DataLoss(
                f"it answers {answer.status} with the range {given} to bytes {extent.start}-{extent.stop - 1}"
            )
        if answer.chunked or answer.length != len(extent):
            raise DataLoss(f"it announces {answer.length} bytes, {len(extent)} were asked for")

    def _body(
        self,
        answer: http.client.HTTPResponse,
        lengths: Sequence[int],
        buffer: memoryview,
        moved: Callable[[], None],
    ) -> Iterator[memoryview]:
        total, done, began = sum(lengths), 0, time.monotonic()
        for length in lengths:
            filled = 0
            while filled < length:
                step = min(length - filled, _STEP_BYTES)
                self._http.wake_rarely(total - done - step > 2 * _WAKE_BYTES)
                count = answer.readinto(buffer[filled : filled + step])
                if not count:
                    raise Unavailable(f"it ended the answer after {done} of {total} bytes")
                filled, done = filled + count, done + count
                if time.monotonic() - began > SILENCE_S + done / LEAST_BYTES_PER_S:
                    raise Unavailable(f"it sent {done} bytes in {time.monotonic() - began:.0f} s")
                moved()
            yield buffer[:length]

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """After any failure the connection is closed; what is not ours becomes Unavailable."""
        try:
            yield
        except BaseException as error:
            self._http.close()
            if isinstance(error, EldricError):
                raise
            if isinstance(error, ssl.SSLCertVerificationError):
                raise NotReady(f"its certificate is not that of this data worker: {error.verify_message}") from error
            if isinstance(error, OSError | http.client.HTTPException):
                raise Unavailable(str(error) or type(error).__name__) from error
            raise


class _Https(http.client.HTTPSConnection):
    """Looks for this cluster's name of the node in its certificate, whatever its address is."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, name: str) -> None:
        super().__init__(host, port, timeout=SILENCE_S, context=tls)
        self._tls, self._name = tls, name
        self._wakes_rarely = False

    def connect(self) -> None:
        self._wakes_rarely = False
        self.sock = socket.create_connection((self.host, self.port), CONNECT_S)  # `close` closes it, whatever follows
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(SILENCE_S)
        made = self._tls.wrap_socket(self.sock, server_hostname=self._name, do_handshake_on_connect=False)
        self.sock = made  # before the handshake, which `abort` may have to end
        made.do_handshake()

    def wake_rarely(self, rarely: bool) -> None:
        """Whether who waits for bytes is woken only when there are _WAKE_BYTES of them, far less often when they come
        slowly. So many must be sure to come: less wakes nobody, but for the end of the connection."""
        if rarely != self._wakes_rarely:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES if rarely else 1)
            self._wakes_rarely = rarely


def _https_address(text: str) -> tuple[str, int]:
    """Host and port of "https://host:port"; an empty host for anything else: no byte travels without TLS."""
    try:
        url = urlsplit(text)
        return (url.hostname or "", url.port or 0) if url.scheme == "https" and url.port else ("", 0)
    except ValueError:
        return "", 0


def _reason(answer: http.client.HTTPResponse) -> str:
    """What an error answer says, or its code."""
    try:
        return str(json.loads(answer.read(1 << 16))["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"it answers {answer.status}"


def _retry_after(answer: http.client.HTTPResponse) -> float:
    text = answer.getheader("retry-after", "")
    seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1.0
    return min(seconds, _MAX_RETRY_AFTER_S)
