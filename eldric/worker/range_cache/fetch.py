"""One fetch: pieces of a model from several data workers at once into the cache.

A few threads for each data worker take spans from one queue, so that each gives what it can. A piece is kept in memory
until it was compared, then written; what was written is noted from time to time, after it is on the disk. Spans of a
data worker that fails go back to the queue, and a piece that it gave wrong is asked of others.
"""

import hashlib
import logging
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from eldric.engine.errors import LoadCancelled
from eldric.errors import DataLoss, EldricError, InvalidRequest
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.connection import Connection
from eldric.worker.range_cache.entry import CachedModel
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.metrics import FetchMetrics
from eldric.worker.range_cache.places import Place, all_given_up, reason_of
from eldric.worker.range_cache.spans import Piece, Span, plan_spans, span_bytes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]

#: Connections to each data worker.
CONNECTIONS = 4
#: How often what was written is noted, and how often somebody looks whether the load was cancelled, in seconds.
NOTE_S, LOOK_S = 1.0, 0.05


class Fetch:
    """Runs once."""

    def __init__(self, entry: CachedModel, source: stage_pb2.ModelSource, metrics: FetchMetrics) -> None:
        self._entry, self._source, self._metrics = entry, source, metrics
        self._changed = threading.Condition()
        # Guarded by the condition's lock:
        self._todo: deque[Span] = deque()
        self._barred: dict[tuple[int, Extent], set[str]] = {}  # who gave wrong what lies there
        self._open = 0  # pieces that are not there yet
        self._done_bytes = self._total_bytes = 0
        self._unnoted: dict[int, list[Extent]] = {}
        self._error: EldricError | None = None
        self._stop = False
        self._places = [Place(place.node_id) for place in source.places]

    def run(self, pieces: Iterable[Piece], tls: ssl.SSLContext, progress: Progress, cancelled: Cancelled) -> None:
        """Bring sorted pieces in. What came before an error stays.

        progress gets (bytes done, bytes of all pieces). Raises LoadCancelled, Unavailable, NotReady, DataLoss,
        NotEnoughSpace.
        """
        pieces = list(pieces)
        self._open, self._total_bytes = len(pieces), sum(len(piece.extent) for piece in pieces)
        connections = self._connect(tls)
        self._todo.extend(plan_spans(pieces, span_bytes(self._total_bytes, len(connections))))
        threads = [threading.Thread(target=self._serve, args=each, daemon=True) for each in connections]
        for thread in threads:
            thread.start()
        try:
            self._watch(progress, cancelled)
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            for _, connection in connections:
                connection.abort()
            for thread in threads:
                thread.join()
            try:
                self._note()
            except EldricError as error:
                self._error = self._error or error
        if self._error is not None:
            raise self._error

    def _connect(self, tls: ssl.SSLContext) -> list[tuple[Place, Connection]]:
        """In random order: no data worker comes first to all workers."""
        made = []
        for place, address in zip(self._places, self._source.places, strict=True):
            try:
                made += [(place, Connection(address, tls)) for _ in range(CONNECTIONS)]
            except InvalidRequest as error:
                place.problem = error
        random.shuffle(made)
        with self._changed:
            self._look_for_hope()
        return made

    def _watch(self, progress: Progress, cancelled: Cancelled) -> None:
        """Until all is there or nothing more can be done."""
        noted_at, told = time.monotonic(), -1
        while True:
            with self._changed:
                self._changed.wait(LOOK_S)
                done, total, ended = self._done_bytes, self._total_bytes, not self._open or self._error is not None
            if done != told:
                progress(done, total)
                told = done
            if cancelled():
                raise LoadCancelled(f"loading was cancelled after {done} of {total} bytes were fetched")
            if ended:
                return
            if time.monotonic() - noted_at > NOTE_S:
                self._note()
                noted_at = time.monotonic()

    def _note(self) -> None:
        with self._changed:
            unnoted, self._unnoted = self._unnoted, {}
        if unnoted:
            self._entry.add(unnoted)

    def _serve(self, place: Place, connection: Connection) -> None:
        """One thread's work for one data worker."""
        buffer = memoryview(bytearray())
        try:
            while (span := self._take(place)) is not None:
                if len(buffer) < len(span.extent):
                    buffer = memoryview(bytearray(len(span.extent)))
                self._fetch(place, connection, span, buffer)
        except EldricError as error:  # of the cache: nobody can help
            self._fail(error)
        except Exception as error:
            log.exception("event=fetch_failed")
            self._fail(EldricError(f"the fetch failed: {type(error).__name__}"))
        finally:
            connection.close()

    def _take(self, place: Place) -> Span | None:
        """The next span for a data worker, once it may be asked; None when there is nothing left to do for it."""
        with self._changed:
            while True:
                if self._stop or not self._open or self._error is not None or place.problem is not None:
                    return None
                wait_s = place.not_before - time.monotonic()
                if wait_s <= 0:
                    for span in self._todo:
                        if not any(place.node_id in self._barred.get(_key(piece), ()) for piece in span.pieces):
                            self._todo.remove(span)
                            return span
                self._changed.wait(wait_s if wait_s > 0 else None)

    def _fetch(self, place: Place, connection: Connection, span: Span, buffer: memoryview) -> None:
        """What does not come goes back to the queue."""
        left, begin = deque(span.pieces), span.extent.start
        steps = connection.ranges(self._source, span.file, span.extent, buffer[: len(span.extent)])
        try:
            while left:
                try:
                    filled = next(steps)
                except EldricError as error:
                    self._failed(place, error)
                    return
                while left and begin + filled >= left[0].extent.stop:
                    piece = left[0]
                    self._settle(place, piece, buffer[piece.extent.start - begin : piece.extent.stop - begin])
                    left.popleft()
            next(steps, None)  # it ends by itself: the connection can be used again
        finally:
            with self._changed:
                if left:
                    self._todo.appendleft(Span(tuple(left)))
                self._look_for_hope()
                self._changed.notify_all()

    def _settle(self, place: Place, piece: Piece, data: memoryview) -> None:
        """Compare and write a piece, or ask for it again."""
        if not self._is_sound(piece, data):
            if piece.whole() != piece:  # it is not known which part is wrong
                self._entry.forget(piece.file, piece.whole().extent)
                self._ask_again(piece, piece.whole())
                return
            assert piece.check is not None
            what = f"{self._source.files[piece.file].path}: {piece.check.what}"
            log.warning("event=corrupt_block source=%s model=%s block=%r", place.node_id, self._source.model, what)
            self._metrics.failures.labels(place.node_id, "corrupt").inc()
            with self._changed:
                self._barred.setdefault(_key(piece), set()).add(place.node_id)
            self._ask_again(piece, piece)
            return
        self._entry.write(piece.file, piece.extent.start, data)
        self._metrics.bytes.labels(place.node_id).inc(len(data))
        with self._changed:
            place.succeeded()
            self._open -= 1
            self._done_bytes += len(data)
            self._unnoted.setdefault(piece.file, []).append(piece.extent)
            self._changed.notify_all()

    def _is_sound(self, piece: Piece, data: memoryview) -> bool:
        check, extent = piece.check, piece.extent
        if check is None:
            return True
        digest = hashlib.sha256(self._entry.read(piece.file, Extent(check.extent.start, extent.start)))
        digest.update(data)
        digest.update(self._entry.read(piece.file, Extent(extent.stop, check.extent.stop)))
        return digest.digest() == check.sha256

    def _ask_again(self, piece: Piece, again: Piece) -> None:
        with self._changed:
            self._todo.append(Span((again,)))
            self._total_bytes += len(again.extent) - len(piece.extent)

    def _failed(self, place: Place, error: EldricError) -> None:
        with self._changed:
            if self._stop:
                return  # it was we who ended it
            place.failed(error, time.monotonic())
            given_up = place.problem is not None
        self._metrics.failures.labels(place.node_id, reason_of(error)).inc()
        log.log(
            logging.WARNING if given_up else logging.INFO,
            "event=fetch_retry source=%s model=%s given_up=%s error=%r",
            *(place.node_id, self._source.model, given_up, error.message),
        )

    def _look_for_hope(self) -> None:
        """Ends the fetch when nobody is left who could give what is missing. With the lock held."""
        asked = [place for place in self._places if place.problem is None]
        if not asked and self._open:
            self._error = self._error or all_given_up(self._source.model, self._places)
        for piece in (piece for span in self._todo for piece in span.pieces if self._barred):
            barred = self._barred.get(_key(piece), set())
            if barred and all(place.node_id in barred for place in asked):
                assert piece.check is not None
                file, who = self._source.files[piece.file].path, ", ".join(sorted(barred))
                self._error = self._error or DataLoss(f"{piece.check.what} of {file} is damaged on {who}")

    def _fail(self, error: EldricError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _key(piece: Piece) -> tuple[int, Extent]:
    return piece.file, piece.check.extent if piece.check is not None else piece.extent
