"""Names of models that are being imported: one import at a time for each."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from eldric.errors import AlreadyExists

#: How often who follows an import looks how far it is, in seconds.
_LOOK_S = 0.2


class Claim:
    """One import in progress. source: the URI of what is downloaded, "" for an import from a path."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._state = "waiting", 0, 0
        self._ended = threading.Event()

    def report(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Notes how far the import is, for those who follow it."""
        self._state = phase, done_bytes, total_bytes

    def follow(self, report: Callable[[str, int, int], None]) -> None:
        """Passes on how far the import is, until it has ended one way or the other. report may raise."""
        while not self._ended.wait(_LOOK_S):
            report(*self._state)

    def end(self) -> None:
        self._ended.set()


class Claims:
    """Claims by name. Thread-safe."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, model: str, source: str = "") -> Iterator[tuple[Claim, bool]]:
        """Holds a name while the block runs: the claim, and whether it is ours.

        It is not where the same source is being imported under that name already: follow it, and try again.
        Raises AlreadyExists when something else is being imported under that name.
        """
        with self._lock:
            held = self._claims.get(model)
            if held is not None and (not source or held.source != source):
                raise AlreadyExists(f"a model is being imported as {model!r} right now")
            claim = held or self._claims.setdefault(model, Claim(source))
        try:
            yield claim, held is None
        finally:
            if held is None:
                with self._lock:
                    del self._claims[model]
                claim.end()
