"""Bytes of a fetch are used as soon as they are there, and not before."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from eldric.engine.errors import LoadCancelled
from eldric.errors import Unavailable
from eldric.worker.range_cache.arrivals import Arrivals
from eldric.worker.range_cache.extents import Extent
from eldric.worker.range_cache.fetch import Cancelled
from eldric.worker.range_cache.incoming import Incoming
from eldric.worker.range_cache.spans import Check, Piece

pytestmark = pytest.mark.timeout(20)

LOOSE = Piece(0, Extent(0, 10))
#: Its first ten bytes were there before.
COMPARED = Piece(0, Extent(30, 40), Check(Extent(20, 40), b"", "block 1"))
OTHER_FILE = Piece(1, Extent(0, 10))
PIECES = (LOOSE, COMPARED, OTHER_FILE)


def is_there(arrivals: Arrivals, file: int, start: int, stop: int) -> bool:
    """Asked of a fetch that goes on: a wait that does not return within a moment is one that waits."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[None] = pool.submit(arrivals.wait, file, Extent(start, stop))
        try:
            waiting.result(timeout=0.05)
        except TimeoutError:
            arrivals.end()  # let the thread go
            return False
        return True


@pytest.mark.parametrize(
    ("came", "file", "start", "stop", "there"),
    [
        ((), 0, 0, 1, False),
        ((), 0, 10, 20, True),  # nobody fetches it: it was there
        ((), 0, 9, 11, False),
        ((LOOSE,), 0, 0, 20, True),
        ((LOOSE,), 0, 0, 21, False),
        ((LOOSE,), 0, 20, 30, False),  # was there, but is compared with what comes
        ((LOOSE, COMPARED), 0, 0, 40, True),
        ((LOOSE, COMPARED), 1, 0, 1, False),
        ((OTHER_FILE,), 1, 0, 10, True),
        ((), 2, 0, 10, True),
    ],
)
def test_bytes_are_there_once_all_that_is_compared_with_them_came(
    came: tuple[Piece, ...], file: int, start: int, stop: int, there: bool
) -> None:
    arrivals = Arrivals()
    arrivals.expect(PIECES)
    for piece in came:
        arrivals.came(piece)
    assert is_there(arrivals, file, start, stop) is there


def test_nothing_is_there_before_it_is_known_what_is_missing() -> None:
    assert not is_there(Arrivals(), 0, 0, 1)


def test_a_block_that_came_in_place_of_a_wrong_piece_counts_as_it() -> None:
    arrivals = Arrivals()
    arrivals.expect(PIECES)
    arrivals.came(COMPARED.whole())
    assert is_there(arrivals, 0, 20, 40)


def test_who_waits_gets_what_the_fetch_ended_with_unless_the_bytes_are_there() -> None:
    arrivals = Arrivals()
    arrivals.expect(PIECES)
    arrivals.came(LOOSE)
    arrivals.end(Unavailable("the store is gone"))
    arrivals.wait(0, Extent(0, 10))
    with pytest.raises(Unavailable, match="is gone"):
        arrivals.wait(0, Extent(20, 21))


def test_who_waits_goes_on_as_soon_as_the_bytes_come() -> None:
    def fetch(arrivals: Arrivals, cancelled: Cancelled) -> None:
        arrivals.expect(PIECES)
        for piece in PIECES:
            turn.wait()
            arrivals.came(piece)

    turn = threading.Barrier(2)
    with Incoming(fetch, lambda: False) as incoming:
        turn.wait()
        incoming(0, 0, 10)
        turn.wait()
        incoming(0, 0, 40)
        turn.wait()
        incoming(1, 0, 10)


def test_a_fetch_that_fails_fails_who_left_it_in_peace() -> None:
    with pytest.raises(Unavailable, match="disk"), Incoming(failing(Unavailable("the disk")), lambda: False):
        pass


def test_a_fetch_that_fails_fails_who_waits() -> None:
    waited = False
    with (
        pytest.raises(Unavailable, match="disk"),
        Incoming(failing(Unavailable("the disk")), lambda: False) as incoming,
    ):
        incoming(0, 0, 10)
        waited = True
    assert not waited


def failing(error: Exception) -> Callable[[Arrivals, Cancelled], None]:
    def fetch(arrivals: Arrivals, cancelled: Cancelled) -> None:
        arrivals.expect(PIECES)
        raise error

    return fetch


def test_an_error_of_who_uses_the_bytes_ends_the_fetch() -> None:
    ended = threading.Event()

    def fetch(arrivals: Arrivals, cancelled: Cancelled) -> None:
        arrivals.expect(PIECES)
        while not cancelled():
            ended.wait(0.01)
        ended.set()
        raise LoadCancelled("nobody wants it")

    with pytest.raises(KeyError, match="no memory"), Incoming(fetch, lambda: False):
        raise KeyError("no memory")
    assert ended.is_set()
