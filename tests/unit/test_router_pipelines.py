"""Which pipelines answer for a name, in which order, and what a lost or late word of the controller does."""

import asyncio
from typing import Any

import pytest

from eldric.router.balance import Replica, by_load, others_of
from eldric.router.errors import ModelNotFound, PipelineLoading, PipelineLost
from eldric.router.pipelines import Pipelines
from eldric.v1 import pipeline_pb2


def info(name: str, model: str = "", **fields: Any) -> pipeline_pb2.PipelineInfo:
    made = pipeline_pb2.PipelineInfo(id=f"id-{name}", name=name, model=model or name, state=pipeline_pb2.READY)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def names(pipelines: Pipelines, model: str) -> list[str]:
    return [route.name for route in pipelines.by_load(pipelines.routes(model))]


def known(*infos: pipeline_pb2.PipelineInfo) -> Pipelines:
    pipelines = Pipelines()
    pipelines.listed(pipelines.begin_listing(), infos)
    return pipelines


def test_the_least_loaded_replica_is_tried_first() -> None:
    replicas = [Replica("a", 3, 1, 0), Replica("b", 0, 3, 9), Replica("c", 0, 3, 8), Replica("d", 9, 0, 0)]
    assert by_load(replicas) == ["c", "b", "a", "d"]


def test_the_load_of_others_never_goes_below_zero() -> None:
    assert (others_of(5, 2), others_of(1, 4)) == (3, 0)


def test_replicas_take_turns_while_they_are_equally_loaded() -> None:
    pipelines = known(info("a", "m"), info("b", "m"), info("c", "m"))
    order = []
    for _ in range(6):
        first = pipelines.by_load(pipelines.routes("m"))[0]
        order.append(first.name)
        with pipelines.running(first):
            pass
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_running_generations_and_reported_ones_count() -> None:
    pipelines = known(info("a", "m"), info("b", "m"))
    with pipelines.running(pipelines.routes("m")[0]):
        assert names(pipelines, "m") == ["b", "a"]
        # The report counts our own generation at a; b has two of another router.
        asked = pipelines.begin_listing()
        pipelines.listed(asked, [info("a", "m", slots_used=1), info("b", "m", slots_used=1, queued=1)])
        assert names(pipelines, "m") == ["a", "b"]
    assert names(pipelines, "m") == ["a", "b"]


def test_a_name_means_a_pipeline_or_all_of_a_model() -> None:
    pipelines = known(info("m"), info("m-2", "m"), info("alias", "other"), info("x", "alias"))
    assert sorted(names(pipelines, "m")) == ["m", "m-2"]
    assert names(pipelines, "m-2") == ["m-2"]
    assert names(pipelines, "alias") == ["alias"]
    assert names(pipelines, "other") == ["alias"]
    assert pipelines.names() == ["alias", "m", "m-2", "other", "x"]


def test_a_request_without_a_name_means_the_only_model() -> None:
    assert known().only_name() is None
    assert known(info("p", "m")).only_name() == "p"
    assert known(info("p", "m"), info("q", "m")).only_name() == "m"
    assert known(info("p", "m"), info("q", "n")).only_name() is None


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelNotFound, match="deployed are: a, m"):
        known(info("a", "m")).routes("b")
    with pytest.raises(ModelNotFound, match="no model is deployed"):
        known().routes("b")


def test_a_loading_model_says_how_far_it_is() -> None:
    pipelines = known(info("m", state=pipeline_pb2.DEPLOYING, progress=0.42))
    with pytest.raises(PipelineLoading, match="42%") as caught:
        pipelines.routes("m")
    assert caught.value.progress == pytest.approx(0.42)
    assert pipelines.health() == (
        False,
        {
            "synchronised": True,
            "pipelines": [{"name": "m", "model": "m", "state": "deploying", "progress": 0.42}],
            "progress": 0.42,
        },
    )


async def test_a_request_waits_for_a_model_that_is_about_to_be_ready() -> None:
    pipelines = known(info("m", state=pipeline_pb2.DEPLOYING, progress=1.0))
    waiting = asyncio.ensure_future(pipelines.settled_routes("m"))
    await asyncio.sleep(0)
    pipelines.update(info("other"))
    await asyncio.sleep(0)
    assert not waiting.done()
    pipelines.update(info("m"))
    assert [route.name for route in await waiting] == ["m"]


async def test_a_request_waits_for_news_of_a_model_that_is_half_loaded_as_far_as_is_known() -> None:
    pipelines = known(info("m", state=pipeline_pb2.DEPLOYING, progress=0.73))
    waiting = asyncio.ensure_future(pipelines.settled_routes("m"))
    await asyncio.sleep(0)
    pipelines.update(info("m"))
    assert [route.name for route in await waiting] == ["m"]


async def test_a_request_waits_not_long_and_least_for_a_model_that_is_half_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eldric.router.pipelines.SETTLING_S", 30.0)
    monkeypatch.setattr("eldric.router.pipelines.NEWS_S", 0.01)
    pipelines = known(info("m", state=pipeline_pb2.DEPLOYING, progress=0.99), info("n"))
    with pytest.raises(PipelineLoading):
        await asyncio.wait_for(pipelines.settled_routes("m"), 10)
    monkeypatch.setattr("eldric.router.pipelines.SETTLING_S", 0.05)
    pipelines.update(info("n", state=pipeline_pb2.DEPLOYING, progress=1.0))
    with pytest.raises(PipelineLoading):
        await pipelines.settled_routes("n")


def test_a_degraded_model_is_lost_unless_a_replica_is_ready() -> None:
    broken = info("a", "m", state=pipeline_pb2.DEGRADED, message="stage 1 is lost")
    with pytest.raises(PipelineLost, match="stage 1 is lost"):
        known(broken).routes("m")
    assert names(known(broken, info("b", "m")), "m") == ["b"]
    assert names(known(broken, info("b", "m", state=pipeline_pb2.DEPLOYING), info("c", "m")), "m") == ["c"]


def test_a_pipeline_that_is_undeployed_is_not_found() -> None:
    with pytest.raises(ModelNotFound):
        known(info("m", state=pipeline_pb2.UNDEPLOYING)).routes("m")


def test_a_router_is_healthy_without_pipelines_once_it_was_told_so() -> None:
    assert Pipelines().health()[0] is False
    assert known().health()[0] is True
    assert known(info("a")).health()[0] is True


def test_a_list_replaces_what_is_known() -> None:
    pipelines = known(info("a"), info("b"))
    pipelines.listed(pipelines.begin_listing(), [info("b"), info("c")])
    assert pipelines.names() == ["b", "c"]


def test_what_changed_after_a_list_was_asked_for_is_kept() -> None:
    pipelines = known(info("a"), info("gone"))
    asked = pipelines.begin_listing()
    pipelines.update(info("new"))
    pipelines.update(info("a", state=pipeline_pb2.DEGRADED))
    pipelines.remove("id-gone")
    pipelines.listed(asked, [info("a"), info("gone")])
    assert pipelines.names() == ["a", "new"]
    with pytest.raises(PipelineLost):
        pipelines.routes("a")


def test_load_outlives_a_change_of_the_pipeline() -> None:
    pipelines = known(info("a", "m"), info("b", "m"))
    with pipelines.running(pipelines.routes("m")[0]):
        pipelines.update(info("a", "m", epoch=2))
        assert names(pipelines, "m") == ["b", "a"]


def test_a_generation_may_outlive_its_pipeline() -> None:
    pipelines = known(info("a"))
    route = pipelines.routes("a")[0]
    with pipelines.running(route):
        pipelines.remove("id-a")
    with pipelines.running(route):
        pass


def test_a_route_says_how_to_reach_the_head() -> None:
    ready = info("m", head_address="10.0.0.1:9890", head_node="worker/w7")
    ready.options.context = 512
    (route,) = known(ready).routes("m")
    assert (route.head_address, route.head_name, route.context) == ("10.0.0.1:9890", "w7", 512)
    assert known(info("m")).routes("m")[0].head_name is None
