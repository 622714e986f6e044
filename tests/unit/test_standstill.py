"""How a worker knows that it was itself that stood still."""

from eldric.worker.standstill import Clock


def test_a_long_gap_between_two_looks_counts_for_a_while() -> None:
    clock = Clock(1.5, 100.0)
    assert clock.look(100.25) == clock.look(101.9) == 0.0
    assert clock.look(107.15) == 5.0
    assert clock.look(107.4) == clock.look(108.1) == 5.0
    assert clock.look(108.25) == 0.0


def test_who_looks_first_after_the_gap_does_not_matter() -> None:
    """The stage that finds its links closed may wake before the thread that watches the clock."""
    clock = Clock(1.5, 100.0)
    assert clock.look(105.25) == 5.0  # the stage
    assert clock.look(105.26) == 5.0  # the thread
    assert clock.look(105.3) == 5.0
