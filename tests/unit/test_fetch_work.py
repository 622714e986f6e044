"""What a fetch has left: each piece comes once, whoever fails, lies or stands still."""

import threading

import pytest

from eldric.errors import DataLoss, NotReady, Unavailable
from eldric.worker.range_cache import work as work_module
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.places import Place
from eldric.worker.range_cache.spans import Check, Piece, Span
from eldric.worker.range_cache.work import Flight, Work


def piece(number: int) -> Piece:
    extent = Extent(10 * number, 10 * number + 10)
    return Piece(0, extent, Check(extent, b"", f"block {number}"))


def work(count: int = 3, places: int = 2) -> tuple[Work, list[Place]]:
    """So many spans of two pieces each."""
    made = [Place(f"data/{number}") for number in range(places)]
    spans = [Span((piece(2 * number), piece(2 * number + 1))) for number in range(count)]
    return Work("tale", spans, made), made


def taken(left: Work, place: Place) -> Flight:
    flight = left.take(place)
    assert flight is not None
    return flight


def land(left: Work, flight: Flight, count: int = 2) -> None:
    """So many of its pieces come, and then nothing more."""
    for _ in range(count):
        left.came(flight, flight.left.popleft())
    left.ended(flight)


def test_spans_are_given_out_once_and_all_come() -> None:
    left, (one, other) = work()
    flights = [taken(left, one), taken(left, other), taken(left, one)]
    assert [flight.span.extent.start for flight in flights] == [0, 20, 40]
    for flight in flights:
        land(left, flight)
    now = left.wait(0)
    assert now.ended and now.done_bytes == now.total_bytes == 60
    assert left.take(one) is None and left.error is None


def test_what_did_not_come_goes_to_the_next_and_nothing_else() -> None:
    left, (one, other) = work(count=1)
    land(left, taken(left, one), count=1)
    again = taken(left, other)
    assert list(again.left) == [piece(1)]
    land(left, again, count=1)
    assert left.wait(0).ended


def test_what_stalls_is_doubled_by_one_who_is_idle_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left, (one, other) = work(count=1)
    stalled = taken(left, one)
    monkeypatch.setattr(work_module, "STALLED_S", 0.0)
    double = taken(left, other)
    assert double.span == stalled.span and stalled.doubled
    assert left.came(double, piece(0)) and not left.came(stalled, piece(0))
    assert not left.is_missing(piece(0)) and left.is_missing(piece(1))
    left.ended(stalled)  # it breaks off: what is left is the other one's
    double.left.popleft()
    left.ended(double)
    assert list(taken(left, one).left) == [piece(1)]


def test_somebody_idle_is_woken_when_there_is_something_again() -> None:
    left, (one, other) = work(count=1)
    flight, got = taken(left, one), threading.Event()

    def wait() -> None:
        if left.take(other) is not None:
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.05)
    left.ended(flight)
    assert got.wait(5)
    thread.join()


def test_who_gave_a_piece_wrong_is_not_asked_for_it_again() -> None:
    left, (one, other) = work(count=1)
    flight = taken(left, one)
    left.ask_again(flight, piece(0), piece(0), damaged="block 0 of tale.gguf")
    flight.left.popleft()
    land(left, flight, count=1)
    assert left.error is None
    again = taken(left, other)
    assert list(again.left) == [piece(0)]
    left.ask_again(again, piece(0), piece(0), damaged="block 0 of tale.gguf")
    left.ended(again)
    assert isinstance(left.error, DataLoss)
    assert left.error.message == "block 0 of tale.gguf is damaged on data/0, data/1"
    assert left.take(one) is None


def test_it_ends_when_nobody_is_left_to_ask() -> None:
    left, (one, other) = work()
    flight = taken(left, one)
    assert left.failed(one, NotReady("another file"))
    left.ended(flight)
    assert left.error is None and left.take(one) is None
    flight = taken(left, other)
    other.problem = Unavailable("gone")
    left.ended(flight)
    assert isinstance(left.error, Unavailable) and left.wait(0).ended
    assert isinstance(Work("tale", [Span((piece(0),))], []).error, Unavailable)


def test_after_a_stop_failures_are_nobodys() -> None:
    left, (one, _) = work()
    left.stop()
    assert not left.failed(one, Unavailable("aborted")) and one.failures == 0
    assert left.take(one) is None
