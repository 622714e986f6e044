"""One fetch: pieces of a model from several data workers at once into the cache.

A few threads for each data worker take spans from one queue, so that each gives what it can. A piece is kept in memory
until it was compared, then written, and the next one takes its place; what was written is noted from time to time,
after it is on the disk. Spans of a data worker that fails go back to the queue, and a piece that it gave wrong is asked
of others.
"""

import hashlib
import logging
import random
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from eldric.engine.errors import LoadCancelled
from eldric.errors import EldricError, InvalidRequest
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.arrivals import Arrivals
from eldric.worker.range_cache.connection import Connection
from eldric.worker.range_cache.entry import CachedModel
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.metrics import FetchMetrics
from eldric.worker.range_cache.places import Place, reason_of
from eldric.worker.range_cache.spans import Piece, plan_spans
from eldric.worker.range_cache.work import Flight, Work

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]

#: Connections to a single data worker, to each of several, and to all together: each keeps a piece in memory and has a
#: thread, and a few carry what a link does.
CONNECTIONS, LEAST_CONNECTIONS, MOST_CONNECTIONS = 4, 2, 16
#: How often what was written is noted, and how often somebody looks whether the load was cancelled, in seconds.
NOTE_S, LOOK_S = 1.0, 0.05


def _connections(places: int) -> int:
    """To each of so many data workers."""
    places = max(1, places)
    return max(1, min(max(LEAST_CONNECTIONS, CONNECTIONS // places), CONNECTIONS, MOST_CONNECTIONS // places))


class Fetch:
    """Runs once."""

    def __init__(
        self,
        entry: CachedModel,
        source: stage_pb2.ModelSource,
        metrics: FetchMetrics,
        arrivals: Arrivals | None = None,
    ) -> None:
        """arrivals: told what is there, as soon as it can be read."""
        self._entry, self._source, self._metrics = entry, source, metrics
        self._arrivals = arrivals or Arrivals()
        self._lock = threading.Lock()
        self._unnoted: dict[int, list[Extent]] = defaultdict(list)  # guarded by the lock

    def run(self, pieces: Iterable[Piece], tls: ssl.SSLContext, progress: Progress, cancelled: Cancelled) -> None:
        """Bring sorted pieces in. What came before an error stays.

        progress gets (bytes done, bytes of all pieces). Raises LoadCancelled, Unavailable, NotReady, DataLoss,
        NotEnoughSpace.
        """
        pieces = list(pieces)
        progress(0, sum(len(piece.extent) for piece in pieces))  # before anybody maps what comes
        self._arrivals.expect(pieces)
        connections, places = self._connect(tls)
        work = Work(self._source.model, plan_spans(pieces, len(connections)), places)
        threads = [threading.Thread(target=self._serve, args=(work, *each), daemon=True) for each in connections]
        for thread in threads:
            thread.start()
        try:
            self._watch(work, progress, cancelled)
        finally:
            work.stop()
            for _, connection in connections:
                connection.abort()
            for thread in threads:
                thread.join()
            try:
                self._note()
            except EldricError as error:
                work.fail(error)
        if work.error is not None:
            raise work.error

    def _connect(self, tls: ssl.SSLContext) -> tuple[list[tuple[Place, Connection]], list[Place]]:
        """In random order: no data worker comes first to all workers."""
        made: list[tuple[Place, Connection]] = []
        places = [Place(place.node_id) for place in self._source.places]
        each = _connections(len(places))
        for place, address in zip(places, self._source.places, strict=True):
            try:
                made += [(place, Connection(address, tls)) for _ in range(each)]
            except InvalidRequest as error:
                place.problem = error
        random.shuffle(made)
        return made, places

    def _watch(self, work: Work, progress: Progress, cancelled: Cancelled) -> None:
        """Until all is there or nothing more can be done."""
        noted_at, told = time.monotonic(), 0
        while True:
            now = work.wait(LOOK_S)
            if now.done_bytes != told:
                progress(now.done_bytes, now.total_bytes)
                told = now.done_bytes
            if cancelled():
                raise LoadCancelled(f"loading was cancelled after {told} of {now.total_bytes} bytes were fetched")
            if now.ended:
                return
            if time.monotonic() - noted_at > NOTE_S:
                self._note()
                noted_at = time.monotonic()

    def _note(self) -> None:
        with self._lock:
            unnoted, self._unnoted = self._unnoted, defaultdict(list)
        if unnoted:
            self._entry.add(unnoted)

    def _serve(self, work: Work, place: Place, connection: Connection) -> None:
        """One thread's work for one data worker."""
        buffer = memoryview(bytearray())
        try:
            while (flight := work.take(place)) is not None:
                longest = max(len(piece.extent) for piece in flight.left)
                if len(buffer) < longest:
                    buffer = memoryview(bytearray(longest))
                try:
                    self._fetch(work, flight, connection, buffer)
                finally:
                    work.ended(flight)
        except EldricError as error:  # of the cache: nobody can help
            work.fail(error)
        except Exception as error:
            log.exception("event=fetch_failed")
            work.fail(EldricError(f"the fetch failed: {type(error).__name__}"))
        finally:
            connection.close()

    def _fetch(self, work: Work, flight: Flight, connection: Connection, buffer: memoryview) -> None:
        span, lengths = flight.span, [len(piece.extent) for piece in flight.left]
        came = connection.pieces(self._source, span.file, span.extent, lengths, buffer, lambda: work.moved(flight))
        while flight.left:
            try:
                data = next(came)
            except EldricError as error:
                self._failed(work, flight.place, error)
                return
            self._settle(work, flight, flight.left[0], data)
            flight.left.popleft()
        next(came, None)  # it ends by itself: the connection can be used again

    def _settle(self, work: Work, flight: Flight, piece: Piece, data: memoryview) -> None:
        """Compare and write a piece, or ask for it again."""
        if not work.is_missing(piece):
            return  # another data worker was faster
        if not self._is_sound(piece, data):
            self._ask_again(work, flight, piece)
            return
        self._entry.write(piece.file, piece.extent.start, data)
        self._arrivals.came(piece)
        if work.came(flight, piece):
            self._metrics.bytes.labels(flight.place.node_id).inc(len(data))
            with self._lock:
                self._unnoted[piece.file].append(piece.extent)

    def _ask_again(self, work: Work, flight: Flight, piece: Piece) -> None:
        if piece.whole() != piece:  # it is not known which part is wrong
            self._entry.forget(piece.file, piece.whole().extent)
            work.ask_again(flight, piece, piece.whole())
            return
        what, source = piece.check.what if piece.check is not None else "", flight.place.node_id
        file = self._source.files[piece.file].path
        log.warning("event=corrupt_block source=%s model=%s file=%s block=%r", source, self._source.model, file, what)
        self._metrics.failures.labels(source, "corrupt").inc()
        work.ask_again(flight, piece, piece, damaged=f"{what} of {file}")

    def _is_sound(self, piece: Piece, data: memoryview) -> bool:
        check, extent = piece.check, piece.extent
        if check is None:
            return True
        digest = hashlib.sha256(self._entry.read(piece.file, Extent(check.extent.start, extent.start)))
        digest.update(data)
        digest.update(self._entry.read(piece.file, Extent(extent.stop, check.extent.stop)))
        return digest.digest() == check.sha256

    def _failed(self, work: Work, place: Place, error: EldricError) -> None:
        if not work.failed(place, error):
            return
        self._metrics.failures.labels(place.node_id, reason_of(error)).inc()
        log.log(
            logging.INFO if place.problem is None else logging.WARNING,
            "event=fetch_retry source=%s model=%s given_up=%s error=%r",
            *(place.node_id, self._source.model, place.problem is not None, error.message),
        )
