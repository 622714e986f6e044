"""When better links are tried."""

from eldric.controller.trials import MAX_PAUSE_S, Trials


def begins(trials: Trials, until: float, *, idle: bool = True, start: float = 0.0) -> float | None:
    """When a trial begins, looking once a second."""
    now = start
    while now <= until:
        if trials.take(now, ready=True, idle=idle):
            return now
        now += 1.0
    return None


def test_the_first_trial_comes_a_while_after_the_pipeline_is_ready_and_later_ones_ever_more_rarely() -> None:
    trials, now, pauses = Trials(10.0), 0.0, []
    for _ in range(10):
        began = begins(trials, now + 2000, start=now)
        assert began is not None
        pauses.append(began - now)
        now = began
        trials.ended(better=False)
    assert pauses[:4] == [10, 20, 40, 80] and pauses[-1] == MAX_PAUSE_S


def test_a_trial_that_is_due_waits_until_nothing_runs() -> None:
    trials = Trials(10.0)
    assert begins(trials, 100, idle=False) is None
    assert trials.take(101, ready=True, idle=True)
    assert not trials.take(500, ready=True, idle=True)  # it is running


def test_after_one_that_helped_the_next_comes_soon() -> None:
    trials = Trials(10.0)
    for _ in range(3):
        assert begins(trials, 1000) is not None
        trials.ended(better=False)
    assert begins(trials, 1000) is not None
    trials.ended(better=True)
    assert begins(trials, 1000) == 10


def test_a_pipeline_that_is_not_ready_begins_anew_once_it_is() -> None:
    trials = Trials(10.0)
    assert not trials.take(0, ready=True, idle=True)
    assert not trials.take(20, ready=False, idle=True)
    assert not trials.take(30, ready=True, idle=True)
    assert trials.take(40, ready=True, idle=True)
