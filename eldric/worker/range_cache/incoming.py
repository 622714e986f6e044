"""A fetch that runs beside whoever uses its bytes, in their order: a stage packs its first layers while others come."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from eldric.worker.range_cache.arrivals import Arrivals
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.fetch import Cancelled


class Incoming:
    """Called with (file, offset, length) it returns when these bytes are there: an engine's `fetch`.

    A context, in which the fetch runs. It raises what the fetch raises, where bytes are waited for or at its end; who
    leaves it by an error ends the fetch.
    """

    def __init__(self, fetch: Callable[[Arrivals, Cancelled], None], cancelled: Cancelled) -> None:
        """fetch: blocks until all is there; it tells the arrivals what it brings, and asks whether it was cancelled."""
        self._fetch, self._cancelled = fetch, cancelled
        self._arrivals = Arrivals()
        self._is_left = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    def __call__(self, file: int, offset: int, length: int) -> None:
        self._arrivals.wait(file, Extent(offset, offset + length))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left = error is not None
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._fetch(self._arrivals, lambda: self._is_left or self._cancelled())
        except BaseException as error:  # for the thread that waits
            self._error = error
        self._arrivals.end(self._error)
