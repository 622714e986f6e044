"""Opens the models that stages are loaded from: below the worker's mount, or over HTTP through its cache."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from eldric.engine.ggml.mapping import Fetch as Wait
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import ByteRange
from eldric.errors import EldricError, InvalidRequest, NotFound, NotReady
from eldric.v1 import stage_pb2
from eldric.worker.config import WorkerConfig
from eldric.worker.mounted.changes import FileStamp, stamps_of
from eldric.worker.mounted.mounts import MountedFile, Mounts
from eldric.worker.mounted.read_ahead import ReadAhead
from eldric.worker.range_cache.arrivals import Arrivals
from eldric.worker.range_cache.entry import CachedModel
from eldric.worker.range_cache.fetch import Cancelled, Progress
from eldric.worker.range_cache.fetcher import RangeFetcher
from eldric.worker.range_cache.incoming import Incoming
from eldric.worker.relay import NodeRelay

log = logging.getLogger(__name__)

#: Gets ranges, is told (bytes fetched, bytes to fetch) and asks whether the load was cancelled.
Reader = Callable[[Sequence[ByteRange], Progress, Cancelled], AbstractContextManager[Wait | None]]


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model whose headers can be read.

    reader: a context in which ranges of it, sorted, are brought in. It gives what waits for them, which is an engine's
    `fetch`, or None where nobody needs to wait. mounted: where it is, if reading it may hang because a file server
    does. stamps: of files that others may change. release: gives the file back, so that a cache may drop it; for after
    the stage that maps it is gone.
    """

    file: ModelFile
    reader: Reader
    release: Callable[[], None]
    mounted: MountedFile | None = None
    stamps: tuple[FileStamp, ...] = ()


class Models:
    """The worker's way to model files."""

    def __init__(
        self,
        config: WorkerConfig,
        mounts: Mounts,
        fetcher: RangeFetcher | None = None,
        relay: NodeRelay | None = None,
    ) -> None:
        """Without a fetcher only what mounts have can be opened. `relay`: the tunnel of a worker behind an edge."""
        self._config, self._mounts, self._fetcher, self._relay = config, mounts, fetcher, relay

    def open(self, source: stage_pb2.ModelSource, cancelled: Cancelled) -> OpenModel:
        """Find the file that was planned. Blocks: for a thread of its own.

        Raises NotFound, NotReady, InvalidModel, InvalidRequest, and over HTTP what RangeFetcher.open raises.
        """
        if self._config.models == "http":
            return self._over_http(source, cancelled)
        try:
            file, mounted = self._mounts.open(source)
            stamps = tuple(stamp for stamp in stamps_of(file.paths).values() if stamp is not None)
            reader = _no_wait if mounted is None else _ahead(file.paths)
            return OpenModel(file, reader, lambda: None, mounted, stamps)
        except (NotFound, NotReady, InvalidRequest) as error:
            if self._config.models == "mount" or self._fetcher is None or not source.places:
                raise
            log.info("event=not_mounted model=%s reason=%r", source.model, error.message)
            return self._tell_both(source, cancelled, error)

    def instead(self, opened: OpenModel, source: stage_pb2.ModelSource, cancelled: Cancelled) -> OpenModel | None:
        """The same model over HTTP, where reading it from a mount failed; None where there is no such way.

        Raises what RangeFetcher.open raises.
        """
        if opened.mounted is None or self._config.models == "mount" or self._fetcher is None or not source.places:
            return None
        return self._over_http(source, cancelled)

    def _tell_both(self, source: stage_pb2.ModelSource, cancelled: Cancelled, mount: EldricError) -> OpenModel:
        try:
            return self._over_http(source, cancelled)
        except EldricError as error:
            raise type(error)(f"{error.message}; and not mounted: {mount.message}") from error

    def _over_http(self, source: stage_pb2.ModelSource, cancelled: Cancelled) -> OpenModel:
        fetcher = self._fetcher
        if fetcher is None:
            raise InvalidRequest("this worker cannot fetch models over HTTP")
        if self._relay is not None:
            source = self._relay.reachable(source)
        file, entry = fetcher.open(source, cancelled)
        return OpenModel(file, _incoming(fetcher, entry, source), entry.close)


def _incoming(fetcher: RangeFetcher, entry: CachedModel, source: stage_pb2.ModelSource) -> Reader:
    def reader(ranges: Sequence[ByteRange], progress: Progress, cancelled: Cancelled) -> Incoming:
        def fetch(arrivals: Arrivals, cancelled: Cancelled) -> None:
            fetcher.fetch(entry, source, ranges, progress, cancelled, arrivals)

        return Incoming(fetch, cancelled)

    return reader


def _ahead(paths: Sequence[Path]) -> Reader:
    def reader(ranges: Sequence[ByteRange], progress: Progress, cancelled: Cancelled) -> ReadAhead:
        return ReadAhead(paths, ranges, cancelled)

    return reader


def _no_wait(ranges: Sequence[ByteRange], progress: Progress, cancelled: Cancelled) -> AbstractContextManager[None]:
    return nullcontext()
