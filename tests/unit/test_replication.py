"""When copies of models are made, by whom, and when not: decisions alone, without a cluster."""

import pytest

from eldric.controller.replication import (
    RETRY_S,
    Copy,
    CopyProgress,
    Goal,
    Holding,
    Replication,
    StoreView,
)
from eldric.errors import DataLoss, NotEnoughSpace, Unavailable
from eldric.v1 import stage_pb2

GRACE_S = 100.0
SIZE = 1000


def goal(model: str = "m", copies: int = 2) -> Goal:
    files = [stage_pb2.ModelFile(path=f"{model}/{model}.gguf", size_bytes=SIZE)]
    return Goal(model, copies, stage_pb2.ModelSource(model=model, files=files))


def holder(name: str, *models: str, free_bytes: int = 10 * SIZE, takes_copies: bool = True) -> StoreView:
    return StoreView(name, free_bytes, takes_copies, dict.fromkeys(models or ("m",), Holding.SAME))


def empty(name: str, free_bytes: int = 10 * SIZE, takes_copies: bool = True) -> StoreView:
    return StoreView(name, free_bytes, takes_copies)


def replication(*goals: Goal, urgent: bool = False, at_once: int = 2) -> Replication:
    made = Replication(GRACE_S, at_once)
    for each in goals or (goal(),):
        made.set(each, urgent=urgent)
    return made


def problem(made: Replication, now: float = 0.0) -> str:
    status = made.status("m", now)
    assert status is not None and status.problem is not None
    return status.problem.message


def test_a_copy_is_made_when_one_was_missing_for_the_grace_time() -> None:
    made = replication()
    assert made.survey([holder("a"), holder("b"), empty("c")], 0) == []
    there = [holder("a"), empty("c")]
    assert made.survey(there, 10) == []
    status = made.status("m", 40)
    assert status is not None and (status.holders, status.waits_s) == (("a",), 70)
    assert made.survey(there, 109) == []
    assert made.survey(there, 110) == [Copy("m", "a", "c")]
    assert made.survey(there, 111) == [], "it is being made"


def test_a_data_worker_that_comes_back_in_time_costs_nothing_however_often() -> None:
    made = replication()
    whole, short = [holder("a"), holder("b"), empty("c")], [holder("a"), empty("c")]
    for now in range(0, 2000, 100):
        assert made.survey(whole, now) == []
        assert made.survey(short, now + 1) == []
        assert made.survey(short, now + 99) == []


def test_one_that_comes_back_while_a_copy_is_made_changes_nothing() -> None:
    made = replication()
    made.survey([holder("a"), empty("c")], 0)
    (copy,) = made.survey([holder("a"), empty("c")], GRACE_S)
    assert made.survey([holder("a"), holder("b"), empty("c")], 120) == []
    made.ended(copy, 130)
    everybody = [holder("a"), holder("b"), holder("c"), empty("d")]
    assert made.survey(everybody, 140) == [], "a copy too many stays"
    assert made.survey(everybody[1:], 1000) == [], "and one of the three may go"


def test_a_controller_that_starts_waits_for_those_that_have_not_come_yet() -> None:
    made = replication()
    assert made.survey([holder("a"), empty("c")], 0) == []
    assert made.survey([], 1) == []
    assert made.survey([holder("a"), holder("b"), empty("c")], 50) == []
    assert made.survey([holder("a"), empty("c")], 60) == []


def test_what_an_operator_asks_for_begins_at_once_and_only_once() -> None:
    made = replication(goal(copies=3), urgent=True)
    there = [holder("a"), empty("b"), empty("c", free_bytes=20 * SIZE)]
    begun = made.survey(there, 0)
    assert begun == [Copy("m", "a", "c"), Copy("m", "a", "b")]
    for copy in begun:
        made.ended(copy, 5)
    assert made.survey([holder("a"), holder("b"), holder("c")], 6) == []
    assert made.survey([holder("a"), holder("b"), empty("d")], 7) == [], "from now on with the grace time"


def test_never_more_copies_at_once_than_allowed_and_one_for_each_data_worker() -> None:
    names = [f"m{number}" for number in range(6)]
    made = replication(*(goal(name) for name in names), urgent=True, at_once=3)
    stores = [holder("a", *names), *(empty(f"t{number}") for number in range(5))]
    first = made.survey(stores, 0)
    assert len(first) == 3 and len({copy.target for copy in first}) == 3
    assert made.survey(stores, 1) == []
    made.ended(first[0], 2)
    assert len(made.survey([*stores[:1], holder(first[0].target, first[0].model), *stores[2:]], 3)) == 1
    one = replication(*(goal(name) for name in names), urgent=True, at_once=3)
    assert len(one.survey([holder("a", *names), empty("b")], 0)) == 1, "one at a time for a data worker"


def test_the_model_with_the_fewest_copies_comes_first() -> None:
    made = replication(goal("a", 3), goal("b", 3), at_once=1, urgent=True)
    (copy,) = made.survey([holder("x", "a", "b"), holder("y", "a"), empty("z")], 0)
    assert copy.model == "b"


def test_a_copy_goes_where_there_is_room_and_the_sending_is_shared() -> None:
    made = replication(goal(copies=4), urgent=True)
    stores = [holder("a"), holder("b"), empty("small", SIZE - 1), empty("large", 3 * SIZE), empty("some", SIZE)]
    assert made.survey(stores, 0) == [Copy("m", "a", "large"), Copy("m", "b", "some")]


def test_no_room_is_a_problem_that_names_what_is_missing() -> None:
    made = replication(urgent=True)
    stores = [holder("a"), empty("b", 10), empty("c", 20)]
    assert made.survey(stores, 0) == []
    assert problem(made) == (
        "a copy of m needs 1000 bytes, and no other data worker has so much room: the most has c, 20 bytes"
    )
    status = made.status("m", 0)
    assert status is not None and isinstance(status.problem, NotEnoughSpace)
    assert made.survey([holder("a"), empty("b", SIZE)], 1) == [Copy("m", "a", "b")], "somebody made room"


def test_who_drains_or_has_another_model_of_that_name_gets_no_copy() -> None:
    made = replication(urgent=True)
    other = StoreView("b", 10 * SIZE, held={"m": Holding.OTHER})
    assert made.survey([holder("a"), other, empty("c", takes_copies=False)], 0) == []
    assert "there is none that is up; b has another or a damaged model of that name" in problem(made)


def test_without_any_holder_nothing_can_be_done() -> None:
    made = replication(urgent=True)
    assert made.survey([empty("b"), StoreView("c", SIZE, held={"m": Holding.OTHER})], 0) == []
    assert problem(made) == "no data worker that answers holds m"


def test_a_copy_that_fails_is_tried_elsewhere_and_there_again_ever_more_rarely() -> None:
    made = replication(urgent=True)
    stores = [holder("a"), empty("b", 9 * SIZE), empty("c")]
    (first,) = made.survey(stores, 0)
    assert first.target == "c"
    made.ended(first, 1, DataLoss("it came wrong"))
    (second,) = made.survey(stores, 2)
    assert second.target == "b"
    made.ended(second, 3, Unavailable("it went away"))
    assert made.survey(stores, 4) == []
    assert problem(made) == "it went away"
    (third,) = made.survey(stores, 3 + RETRY_S)
    made.ended(third, 20, Unavailable("again"))
    tries = 0
    for now in range(20, 20 + 3600):
        for copy in made.survey(stores, now):
            made.ended(copy, now, Unavailable("again"))
            tries += 1
    assert 10 < tries < 30, "two data workers in an hour, at most every ten minutes in the end"


def test_another_source_is_taken_after_one_failed() -> None:
    made = replication(goal(copies=3), urgent=True, at_once=1)
    stores = [holder("a"), holder("b"), empty("c"), empty("d")]
    (first,) = made.survey(stores, 0)
    assert first.source == "a"
    made.ended(first, 1, DataLoss("it came wrong"))
    assert [copy.source for copy in made.survey(stores, 2)] == ["b"]


def test_a_copy_goes_on_where_it_broke_off_and_needs_room_for_the_rest_only() -> None:
    made = replication(urgent=True)
    (copy,) = made.survey([holder("a"), empty("b", 2 * SIZE)], 0)
    made.progress(copy, CopyProgress("downloading", 900, SIZE))
    status = made.status("m", 0)
    assert status is not None and list(status.copying.values()) == [CopyProgress("downloading", 900, SIZE)]
    made.ended(copy, 1, Unavailable("it broke off"))
    assert made.survey([holder("a"), empty("b", 99), empty("c", SIZE - 1)], 1 + RETRY_S) == []
    assert made.survey([holder("a"), empty("b", 100), empty("c", 2 * SIZE)], 2 + RETRY_S) == [Copy("m", "a", "b")]


def test_a_dropped_goal_ends_its_copies() -> None:
    made = replication(urgent=True)
    (copy,) = made.survey([holder("a"), empty("b")], 0)
    assert made.drop("m") == [copy]
    made.ended(copy, 1, Unavailable("ended"))
    assert made.status("m", 1) is None and made.goals == []
    assert made.survey([holder("a"), empty("b")], 1000) == []


@pytest.mark.parametrize("urgent", [False, True])
def test_the_simulation_of_a_year_keeps_every_model_alive(urgent: bool) -> None:
    """Ten data workers of which each is lost for good, in turn, every week, and replaced by an empty one."""
    made = replication(*(goal(f"m{number}", 3) for number in range(8)), urgent=urgent)
    stores: dict[str, set[str]] = {f"s{number}": set() for number in range(10)}
    for number in range(8):
        for place in range(3):
            stores[f"s{(number + place) % 10}"].add(f"m{number}")
    running: dict[Copy, float] = {}
    copies = 0
    for minute in range(0, 52 * 7 * 24 * 60, 30):
        now = minute * 60.0
        if minute % (7 * 24 * 60) == 60:
            lost, week = next(iter(stores)), minute // (7 * 24 * 60)
            del stores[lost]
            stores[f"new{week}"] = set()
            for copy in [copy for copy in running if lost in (copy.source, copy.target)]:
                made.ended(copy, now, Unavailable("lost"))
                del running[copy]
        for copy in [copy for copy, at in running.items() if at <= now]:
            stores[copy.target].add(copy.model)
            made.ended(copy, now)
            del running[copy]
        views = [StoreView(name, 10**9, held=dict.fromkeys(held, Holding.SAME)) for name, held in stores.items()]
        for copy in made.survey(views, now):
            running[copy] = now + 3600
            copies += 1
        assert len(running) <= 2
    held = [sum(f"m{number}" in models for models in stores.values()) for number in range(8)]
    assert held == [3] * 8
    assert copies <= 52 * 8
