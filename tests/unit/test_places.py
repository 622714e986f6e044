"""Data workers that fail are left alone for a while, and given up in the end."""

from eldric.errors import DataLoss, EldricError, NotReady, QueueIsFull, Unavailable
from eldric.worker.range_cache.places import BUSY_S, MOST_WRONG, UNREACHABLE_S, Place, all_given_up, reason_of


def pause(place: Place, error: EldricError, now: float) -> float:
    """Seconds for which a failure has a data worker left alone."""
    place.failed(error, now)
    return place.not_before - now


def test_pauses_grow_and_begin_anew_after_a_success() -> None:
    place = Place("data/a")
    pauses = [pause(place, Unavailable("gone"), 0.0) for _ in range(8)]
    assert 0.1 <= pauses[0] <= 0.15 and 2.0 <= pauses[-1] <= 3.0
    place.succeeded()
    assert pause(place, Unavailable("gone"), 100.0) <= 0.1501 and place.problem is None


def test_one_that_is_unreachable_for_long_is_given_up_and_one_that_is_busy_much_later() -> None:
    gone, busy = Place("data/a"), Place("data/b")
    for now in (0.0, UNREACHABLE_S - 1):
        gone.failed(Unavailable("gone"), now)
        busy.failed(QueueIsFull("busy", 2.0), now)
    assert gone.problem is None
    gone.failed(Unavailable("gone"), UNREACHABLE_S)
    assert isinstance(gone.problem, Unavailable)
    assert 2.0 <= pause(busy, QueueIsFull("busy", 2.0), UNREACHABLE_S) <= 3.0 and busy.problem is None
    busy.failed(QueueIsFull("busy", 2.0), BUSY_S)
    assert busy.problem is not None


def test_one_that_has_another_file_is_given_up_at_once_and_a_liar_after_some_lies() -> None:
    other, liar = Place("data/a"), Place("data/b")
    other.failed(NotReady("another file"), 0.0)
    assert other.problem is not None
    for number in range(MOST_WRONG):
        assert liar.problem is None
        liar.failed(DataLoss(f"lie {number}"), 0.0)
    assert liar.problem is not None


def test_the_error_names_everybody_and_is_of_the_worst_kind() -> None:
    def places(*problems: EldricError) -> list[Place]:
        return [Place(f"data/{number}", problem=problem) for number, problem in enumerate(problems)]

    made = all_given_up("tale", places(Unavailable("gone"), DataLoss("lied")))
    assert isinstance(made, DataLoss) and "data/0: gone; data/1: lied" in made.message
    assert isinstance(all_given_up("tale", places(NotReady("no"), NotReady("no"))), NotReady)
    assert isinstance(all_given_up("tale", places(NotReady("no"), Unavailable("gone"))), Unavailable)
    assert "none holds it" in all_given_up("tale", []).message
    kinds = (QueueIsFull("x"), DataLoss("x"), Unavailable("x"), NotReady("x"))
    assert list(map(reason_of, kinds)) == ["busy", "wrong_answer", "unreachable", "refused"]
