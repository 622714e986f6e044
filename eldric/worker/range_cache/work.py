"""What a fetch has left to do, and who is at it: the part that its threads share. Knows no socket and no file."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eldric.errors import DataLoss, EldricError
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.places import Place, all_given_up
from eldric.worker.range_cache.spans import Piece, Span, plan_spans

#: A data worker that sends nothing for so long is asked no less, but somebody idle fetches the same from another one.
STALLED_S = 2.0


@dataclass(slots=True, eq=False)
class Flight:
    """A span on its way. left: its pieces that have not come. doubled: somebody else fetches them too."""

    place: Place
    span: Span
    left: deque[Piece]
    moved_at: float
    doubled: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    done_bytes: int
    total_bytes: int
    ended: bool


class Work:
    """Thread-safe."""

    def __init__(self, model: str, spans: Iterable[Span], places: Sequence[Place]) -> None:
        self._changed = threading.Condition()
        self._model, self._places = model, places
        self._todo = deque(spans)
        self._flights: list[Flight] = []
        self._barred: dict[tuple[int, Extent], set[str]] = {}  # who gave wrong what lies there
        self._damaged: dict[tuple[int, Extent], str] = {}  # what that is, for people
        self._missing = {_key(piece): len(piece.extent) for span in self._todo for piece in span.pieces}
        self._done_bytes = 0
        self._stopped = False
        self.error: EldricError | None = None
        with self._changed:
            self._look_for_hope()

    def wait(self, seconds: float) -> Standing:
        """How things stand, after a change or that long."""
        with self._changed:
            self._changed.wait(seconds)
            if any(time.monotonic() - flight.moved_at > STALLED_S for flight in self._flights):
                self._changed.notify_all()  # for somebody idle
            total_bytes = self._done_bytes + sum(self._missing.values())
            return Standing(self._done_bytes, total_bytes, not self._missing or self.error is not None)

    def take(self, place: Place) -> Flight | None:
        """The next span for a data worker, once it may be asked; None when there is nothing left to do for it."""
        with self._changed:
            while not (self._stopped or not self._missing or self.error or place.problem):
                now = time.monotonic()
                if now >= place.not_before and (span := self._next(place, now)) is not None:
                    self._flights.append(Flight(place, span, deque(span.pieces), now))
                    return self._flights[-1]
                self._changed.wait(max(0.0, place.not_before - now) or None)
            return None

    def moved(self, flight: Flight) -> None:
        """Something came."""
        flight.moved_at = time.monotonic()

    def came(self, flight: Flight, piece: Piece) -> bool:
        """A piece is there. Returns whether it was missing."""
        with self._changed:
            flight.place.succeeded()
            nbytes = self._missing.pop(_key(piece), None)
            self._done_bytes += nbytes or 0
            self._changed.notify_all()
            return nbytes is not None

    def is_missing(self, piece: Piece) -> bool:
        with self._changed:
            return _key(piece) in self._missing

    def ask_again(self, flight: Flight, piece: Piece, again: Piece, damaged: str = "") -> None:
        """A piece came wrong: fetch `again` in its place. damaged: what this data worker has wrong: ask others."""
        with self._changed:
            if damaged:
                self._barred.setdefault(_key(piece), set()).add(flight.place.node_id)
                self._damaged[_key(piece)] = damaged
            if self._missing.pop(_key(piece), None) is not None:
                self._missing[_key(again)] = len(again.extent)
                self._todo.append(Span((again,)))

    def ended(self, flight: Flight) -> None:
        """Nothing more comes: what is left of it goes back, unless somebody else is at it."""
        with self._changed:
            self._flights.remove(flight)
            left = [piece for piece in flight.left if _key(piece) in self._missing]
            if left and not flight.doubled:
                self._todo.extendleft(reversed(plan_spans(left, 1)))
            self._look_for_hope()
            self._changed.notify_all()

    def failed(self, place: Place, error: EldricError) -> bool:
        """A data worker failed. Returns False when it was we who ended it."""
        with self._changed:
            if not self._stopped:
                place.failed(error, time.monotonic())
            return not self._stopped

    def fail(self, error: EldricError) -> None:
        """Nobody can help."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _next(self, place: Place, now: float) -> Span | None:
        """What waits, or else what another data worker has stopped sending. With the lock held."""
        for span in self._todo:
            if self._may(place, span.pieces):
                self._todo.remove(span)
                return span
        for flight in self._flights:
            stalled = now - flight.moved_at > STALLED_S and not flight.doubled and flight.place is not place
            if stalled and flight.left and self._may(place, flight.left):
                flight.doubled = True
                return Span(tuple(flight.left))
        return None

    def _may(self, place: Place, pieces: Iterable[Piece]) -> bool:
        return not self._barred or not any(place.node_id in self._barred.get(_key(piece), ()) for piece in pieces)

    def _look_for_hope(self) -> None:
        """Ends the fetch when nobody is left who could give what is missing. With the lock held."""
        asked = [place for place in self._places if place.problem is None]
        if not asked and self._missing:
            self.error = self.error or all_given_up(self._model, list(self._places))
        for key, barred in self._barred.items():
            if key in self._missing and all(place.node_id in barred for place in asked):
                who = ", ".join(sorted(barred))
                self.error = self.error or DataLoss(f"{self._damaged[key]} is damaged on {who}")


def _key(piece: Piece) -> tuple[int, Extent]:
    return piece.file, piece.extent
