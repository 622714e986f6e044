"""Fetches what stages need of models: first the headers, by which a model can be opened, then a shard's ranges."""

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from eldric.engine.errors import LoadCancelled
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import ByteRange
from eldric.errors import NotReady
from eldric.security import Identity
from eldric.v1 import stage_pb2
from eldric.worker.range_cache.arrivals import Arrivals
from eldric.worker.range_cache.cache import RangeCache
from eldric.worker.range_cache.entry import CachedModel
from eldric.worker.range_cache.extents import Extent, Extents
from eldric.worker.range_cache.fetch import Cancelled, Fetch, Progress
from eldric.worker.range_cache.metrics import FetchMetrics
from eldric.worker.range_cache.places import all_given_up
from eldric.worker.range_cache.spans import Check, plan_pieces
from eldric.worker.range_cache.sums import block_checks

log = logging.getLogger(__name__)

#: Largest header of a file, in bytes: the largest vocabularies take some 20 MB.
MAX_HEADER_BYTES = 256 << 20
#: Another process that fetches into the same entry and brings nothing for so long is not waited for.
_STUCK_S = 15.0
_POLL_S = 0.05

Wanted = Mapping[int, Sequence[Extent]]


class RangeFetcher:
    """Of one worker. Thread-safe; its methods block and are for threads of their own."""

    def __init__(self, cache: RangeCache, identity: Callable[[], Identity], metrics: FetchMetrics) -> None:
        self._cache, self._identity, self._metrics = cache, identity, metrics

    def open(self, source: stage_pb2.ModelSource, cancelled: Cancelled) -> tuple[ModelFile, CachedModel]:
        """Open a model of which only the headers need to be there; the caller closes both.

        Raises NotReady, Unavailable, DataLoss, NotEnoughSpace, LoadCancelled, InvalidModel, InvalidRequest.
        """
        for file in source.files:
            if not 0 < file.header_bytes <= min(file.size_bytes, MAX_HEADER_BYTES):
                raise NotReady(f"the model store does not say how long the header of {file.path} is: update it")
        entry = self._cache.open(source)
        try:
            wanted = {number: [Extent(0, file.header_bytes)] for number, file in enumerate(source.files)}
            header = Check(wanted[0][0], source.header_sha256, "the header")
            self._bring(entry, source, wanted, {0: [header]}, lambda done, total: None, cancelled)
            model = ModelFile.open(entry.paths[0])
            if bytes.fromhex(model.header_sha256()) != source.header_sha256:
                model.close()
                entry.forget(0, Extent(0, source.files[0].header_bytes))
                raise NotReady(f"the cached header of {source.model!r} differs from the model store's: deploy again")
            return model, entry
        except BaseException:
            entry.close()
            raise

    def fetch(
        self,
        entry: CachedModel,
        source: stage_pb2.ModelSource,
        ranges: Sequence[ByteRange],
        progress: Progress,
        cancelled: Cancelled,
        arrivals: Arrivals | None = None,
    ) -> None:
        """Bring ranges in; what is there already is not fetched. progress gets (bytes done, bytes to fetch), arrivals
        what is there as soon as it can be read.

        Raises LoadCancelled, Unavailable, NotReady, DataLoss, NotEnoughSpace.
        """
        wanted: dict[int, list[Extent]] = defaultdict(list)
        for part in ranges:
            wanted[part.file].append(Extent(part.offset, part.offset + part.length))
        self._bring(entry, source, wanted, None, progress, cancelled, arrivals)

    def _bring(
        self,
        entry: CachedModel,
        source: stage_pb2.ModelSource,
        wanted: Wanted,
        checks: Mapping[int, Sequence[Check]] | None,
        progress: Progress,
        cancelled: Cancelled,
        arrivals: Arrivals | None = None,
    ) -> None:
        """checks: None: the sums of the blocks, which a data worker is asked for when something is missing."""
        self._cache.claim(entry, wanted)
        if not _missing_bytes(wanted, entry.have()):
            return
        with self._alone(entry, wanted, progress, cancelled):
            if not (missing_bytes := _missing_bytes(wanted, entry.have())):
                return
            if not source.places:
                raise all_given_up(source.model, [])
            self._cache.reserve(entry, missing_bytes)
            tls = self._identity().client_context()
            known = block_checks(source, tls, cancelled) if checks is None else checks
            pieces = plan_pieces(wanted, entry.have(), known)
            began = time.monotonic()
            Fetch(entry, source, self._metrics, arrivals).run(pieces, tls, progress, cancelled)
            log.info(
                "event=fetched model=%s bytes=%d seconds=%.2f",
                *(source.model, sum(len(piece.extent) for piece in pieces), time.monotonic() - began),
            )

    @contextlib.contextmanager
    def _alone(self, entry: CachedModel, wanted: Wanted, progress: Progress, cancelled: Cancelled) -> Iterator[None]:
        """Fetch into an entry one at a time, also among processes: who comes second finds the bytes there.

        Nobody depends on it: a holder that stands still is not waited for, and fetching twice does no harm.
        """
        left, changed_at, lock = -1, time.monotonic(), entry.try_fetch_lock()
        while lock is None:
            if cancelled():
                raise LoadCancelled("loading was cancelled while another load fetched the same model")
            missing_bytes = _missing_bytes(wanted, entry.have())
            if missing_bytes != left:
                left, changed_at = missing_bytes, time.monotonic()
                progress(0, missing_bytes)
            if time.monotonic() - changed_at > _STUCK_S:
                log.warning("event=fetch_lock_stuck folder=%s", entry.folder)
                break
            time.sleep(_POLL_S)
            lock = entry.try_fetch_lock()
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def _missing_bytes(wanted: Wanted, have: Sequence[Extents]) -> int:
    return sum(len(gap) for file, extents in wanted.items() for extent in extents for gap in have[file].missing(extent))
