"""How fast workers are taken to be, from what their stages took."""

from eldric.controller.pacing import FEWEST_STEPS, Measured, paces

WORKERS = ("a", "b", "c", "d")


def stage(worker: str, read_bytes: int, step_ms: float, steps: int = FEWEST_STEPS) -> Measured:
    return Measured(worker, read_bytes, step_ms, steps)


def test_a_pace_is_time_for_bytes_and_others_are_taken_for_ordinary() -> None:
    found = paces([stage("a", 1000, 1.0), stage("b", 500, 2.0), stage("c", 1000, 2.0)], WORKERS)
    assert found == {"a": 100, "b": 400, "c": 200, "d": 200}


def test_stages_of_one_worker_count_together() -> None:
    assert paces([stage("a", 1000, 1.0), stage("a", 3000, 7.0), stage("b", 1000, 1.0)], ["a", "b"]) == {
        "a": 200,
        "b": 100,
    }


def test_small_differences_are_noise() -> None:
    assert paces([stage("a", 1000, 1.0), stage("b", 1000, 1.2)], WORKERS) == {}


def test_a_stage_that_has_hardly_computed_says_nothing() -> None:
    assert paces([stage("a", 1000, 1.0), stage("b", 1000, 9.0, steps=FEWEST_STEPS - 1)], WORKERS) == {}
    assert paces([stage("a", 1000, 1.0), stage("b", 1000, 0.0)], WORKERS) == {}
    assert paces([], WORKERS) == {}
