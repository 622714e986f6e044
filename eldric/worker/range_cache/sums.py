"""The sums of a model's blocks: from the first data worker that has those that the plan was made with."""

import contextlib
import hashlib
import logging
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable

from eldric.engine.errors import LoadCancelled
from eldric.errors import DataLoss, EldricError, QueueIsFull, Unavailable
from eldric.v1 import model_store_pb2, stage_pb2
from eldric.worker.range_cache.connection import Connection
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.places import Place, all_given_up
from eldric.worker.range_cache.spans import Check

log = logging.getLogger(__name__)

Checks = dict[int, list[Check]]

#: How long one data worker is asked alone, before the next one is asked as well, in seconds.
_ALONE_S = 1.0
#: How long those that cannot be reached, or are busy, are asked again and again, and the pause between, in seconds.
_PATIENCE_S, _PAUSE_S = 15.0, 0.5
_LOOK_S = 0.05
#: Sums are kept for blocks of at least so many bytes.
_LEAST_BLOCK_BYTES = 4096


def block_checks(source: stage_pb2.ModelSource, tls: ssl.SSLContext, cancelled: Callable[[], bool]) -> Checks:
    """The sums of all blocks as checks, by file; none where the store has none.

    Raises LoadCancelled, Unavailable, NotReady, DataLoss.
    """
    if not all(file.blocks_sha256 for file in source.files):
        log.warning("event=no_block_sums model=%s: it is fetched without comparing its blocks", source.model)
        return {}
    with contextlib.closing(_Asking(source, tls)) as asking:
        while True:
            if cancelled():
                raise LoadCancelled("loading was cancelled before it fetched anything")
            if (checks := asking.look()) is not None:
                return checks


class _Asking:
    """Questions on their way, each in a thread of its own."""

    def __init__(self, source: stage_pb2.ModelSource, tls: ssl.SSLContext) -> None:
        self._source, self._tls = source, tls
        self._places = [Place(place.node_id) for place in source.places]
        self._not_before = dict.fromkeys(random.sample(range(len(self._places)), len(self._places)), 0.0)
        self._began = self._asked_at = time.monotonic()
        self._answers: queue.SimpleQueue[tuple[int, Checks | EldricError]] = queue.SimpleQueue()
        self._asked: dict[int, Connection | None] = {}

    def look(self) -> Checks | None:
        """Ask whoever is to be asked now; the sums, once they are there. Raises when nobody is left."""
        now = time.monotonic()
        ready = [number for number, not_before in self._not_before.items() if not_before <= now]
        if ready and (not self._asked or now - self._asked_at > _ALONE_S):
            self._ask(ready[0], now)
        if not self._asked and not self._not_before:
            raise all_given_up(self._source.model, self._places)
        try:
            number, answer = self._answers.get(timeout=_LOOK_S)
        except queue.Empty:
            return None
        del self._asked[number]
        if not isinstance(answer, EldricError):
            return answer
        log.info("event=no_sums source=%s error=%r", self._places[number].node_id, answer.message)
        self._places[number].problem = answer
        if isinstance(answer, Unavailable | QueueIsFull) and time.monotonic() - self._began < _PATIENCE_S:
            self._not_before[number] = time.monotonic() + _PAUSE_S
        return None

    def close(self) -> None:
        for connection in self._asked.values():
            if connection is not None:
                connection.abort()

    def _ask(self, number: int, now: float) -> None:
        del self._not_before[number]
        self._asked_at = now
        try:
            self._asked[number] = Connection(self._source.places[number], self._tls)
        except EldricError as error:
            self._asked[number] = None
            self._answers.put((number, error))
            return
        threading.Thread(target=self._question, args=(number, self._asked[number]), daemon=True).start()

    def _question(self, number: int, connection: Connection) -> None:
        try:
            with contextlib.closing(connection):
                self._answers.put((number, _checks(self._source, connection.blocks(self._source.model))))
        except EldricError as error:
            self._answers.put((number, error))
        except Exception as error:
            log.exception("event=sums_failed")
            self._answers.put((number, EldricError(f"its block sums cannot be read: {type(error).__name__}")))


def _checks(source: stage_pb2.ModelSource, blocks: model_store_pb2.ModelBlocks) -> Checks:
    """The sums as checks. Raises DataLoss when they are not those that the plan was made with."""
    size = blocks.block_bytes
    if size < _LEAST_BLOCK_BYTES or len(blocks.files) != len(source.files):
        raise DataLoss(f"it has sums of {len(blocks.files)} files and blocks of {size} bytes")
    checks: Checks = {}
    for number, (file, sums) in enumerate(zip(source.files, blocks.files, strict=True)):
        if hashlib.sha256(b"".join(sums.block_sha256)).digest() != file.blocks_sha256:
            raise DataLoss(f"its block sums of {file.path} are not those of the model that was planned")
        starts = range(0, file.size_bytes, size)
        if len(starts) != len(sums.block_sha256):
            raise DataLoss(f"it has {len(sums.block_sha256)} block sums of {file.path}, not {len(starts)}")
        checks[number] = [
            Check(Extent(start, min(start + size, file.size_bytes)), digest, f"block {index}")
            for index, (start, digest) in enumerate(zip(starts, sums.block_sha256, strict=True))
        ]
    return checks
