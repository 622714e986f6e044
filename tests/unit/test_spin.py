"""When a receiver looks again and again, and when it goes to sleep at once."""

import time

from eldric.transport.spin import Spinner


def looks(spinner: Spinner, until: int | None, deadline: float | None = None) -> tuple[bool, int]:
    """What `wait` said, and how often it looked. until: the look that succeeds."""
    count = 0

    def ready() -> bool:
        nonlocal count
        count += 1
        return count == until

    return bool(spinner.wait(ready, deadline)), count


def test_what_comes_soon_is_found_without_sleeping() -> None:
    assert looks(Spinner(10), 5) == (True, 5)


def test_it_gives_up_in_time() -> None:
    began = time.monotonic()
    found, count = looks(Spinner(0.02), None)
    assert not found and count > 1
    assert 0.02 <= time.monotonic() - began < 1


def test_a_deadline_comes_first() -> None:
    assert looks(Spinner(10), None, time.monotonic()) == (False, 0)
    began = time.monotonic()
    assert looks(Spinner(10), None, began + 0.02)[0] is False
    assert time.monotonic() - began < 5


def test_nothing_is_spun_where_that_is_off() -> None:
    assert looks(Spinner(0), 1) == (False, 0)


def test_long_waits_stop_it_and_short_ones_start_it_again() -> None:
    spinner = Spinner(0.001)
    for _ in range(20):
        if not looks(spinner, None)[0]:
            time.sleep(0.003)
            spinner.slept()
    assert looks(spinner, 1) == (False, 0)
    for _ in range(20):
        spinner.wait(lambda: None, None)
        spinner.slept()  # something came at once
    assert looks(spinner, 1) == (True, 1)
