"""Pipelines seen from the controller: reports of nodes go in, states, answers and changes come out."""

from dataclasses import replace
from itertools import pairwise

import pytest

from eldric.controller.deployments import (
    Change,
    Deployment,
    Deployments,
    Mend,
    Orphan,
    PipelineChanged,
    PipelineRemoved,
    PipelineState,
    Reload,
    Wanted,
    WantedChanged,
)
from eldric.controller.nodes import Memory, NodeInfo, StageKey, StageReport, StageState
from eldric.controller.pipelines import Phase, PipelineRecord, StageRecord
from eldric.controller.registry import Node, Registry
from eldric.errors import AlreadyExists, NotFound
from eldric.v1 import common_pb2, pipeline_pb2, stage_pb2

SERVING, BROKEN, LOADED, LOADING = StageState.SERVING, StageState.BROKEN, StageState.LOADED, StageState.LOADING


def stage(index: int, worker: str, incarnation: int = 7) -> StageRecord:
    return StageRecord(index, worker, incarnation, index, index + 1, 100, 20, 3, 200)


def record(*workers: str, phase: Phase = Phase.RUNNING, epoch: int = 1, name: str = "m") -> PipelineRecord:
    stages = tuple(stage(index, worker) for index, worker in enumerate(workers))
    messages = pipeline_pb2.DeployRequest(), common_pb2.StageOptions(), stage_pb2.ModelSource()
    return PipelineRecord(f"id-{name}", name, "model", phase, epoch, stages, 0.0, *messages, "zmq")


class World:
    """A registry and deployments together; workers report as they are told."""

    def __init__(self, *workers: str) -> None:
        self.registry = Registry(1, 1.0, 3.0)
        self.deployments = Deployments(self.registry.get, 1.0)
        self.links: dict[str, int] = {}
        self.sequence = 0
        for worker in workers:
            self.join(worker)

    def join(self, worker: str, incarnation: int = 7) -> list[Change]:
        info = NodeInfo("worker", worker, f"{worker}:1", "", "0", 1, 1, incarnation)
        self.registry.register(info, 0.0, 0.0)
        self.links[worker] = self.registry.link_opened(info.id, incarnation)
        return self.deployments.node_changed(info.id)

    def beat(self, worker: str, *states: StageState, epoch: int = 1, message: str = "", first: int = 0) -> list[Change]:
        """The worker reports its stages of pipeline m, from index `first` on."""
        self.sequence += 1
        node = self.node(worker)
        reports = [
            StageReport(StageKey("id-m", epoch, index), state, message, Memory(kv=150))
            for index, state in enumerate(states, start=first)
        ]
        self.registry.beat(node.id, node.info.incarnation, self.sequence, 0.0, stages=reports)
        return self.deployments.beaten(node.id)

    def lose(self, worker: str) -> list[Change]:
        node = self.node(worker)
        self.registry.link_closed(node.id, self.links[worker])
        self.registry.probed(node.id, node.info.incarnation, False, 0.0)
        return self.deployments.node_changed(node.id)

    def drain(self, worker: str, *states: StageState, first: int = 0) -> list[Change]:
        """The worker says that it is about to end."""
        node = self.node(worker)
        self.sequence += 1
        reports = [StageReport(StageKey("id-m", 1, index), state) for index, state in enumerate(states, start=first)]
        self.registry.beat(node.id, node.info.incarnation, self.sequence, 0.0, draining=True, stages=reports)
        return self.deployments.node_changed(node.id)

    def node(self, worker: str) -> Node:
        found = self.registry.get(f"worker/{worker}")
        assert found is not None
        return found

    def run(self, *workers: str) -> Deployment:
        """A pipeline m with a stage on each worker, all serving."""
        self.deployments.add(record(*workers))
        for index, worker in enumerate(workers):
            self.beat(worker, SERVING, first=index)
        return self.deployments.find("m")

    def wanted(self, worker: str) -> list[Wanted]:
        return self.deployments.wanted(f"worker/{worker}")


def reloads(world: World, *times: float) -> list[float]:
    """The times at which a reload of pipeline m is asked for."""
    return [now for now in times if Reload("id-m") in world.deployments.tick(now)]


def test_a_pipeline_is_ready_once_all_its_stages_serve() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    assert (running.state, running.message) == (PipelineState.READY, "")
    assert world.wanted("a") == [Wanted(StageKey("id-m", 1, 0), degraded=False)]


def test_a_lost_worker_degrades_its_pipeline_and_every_worker_is_told_at_once() -> None:
    world = World("a", "b", "c")
    running = world.run("a", "b")
    changes = world.lose("b")
    assert changes == [PipelineChanged("id-m"), WantedChanged("worker/a"), WantedChanged("worker/b")]
    assert (running.state, running.message) == (
        PipelineState.DEGRADED,
        "stage 1 of 2 on worker b is gone: its process has ended",
    )
    assert world.wanted("a")[0].degraded
    assert world.lose("c") == []


def test_the_same_process_that_comes_back_makes_it_ready_again() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.lose("b")
    world.beat("b", SERVING, first=1)
    assert (running.state, running.message) == (PipelineState.READY, "")
    assert not world.wanted("a")[0].degraded


def test_another_process_under_the_workers_name_does_not() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.join("b", incarnation=8)
    world.beat("b")
    assert (running.state, running.message) == (
        PipelineState.DEGRADED,
        "stage 1 of 2 on worker b is gone: its worker restarted",
    )


def test_a_worker_that_leaves_degrades_its_pipeline() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.registry.deregister("worker/b")
    world.deployments.node_changed("worker/b")
    assert running.message == "stage 1 of 2 on worker b is gone: its worker left the cluster"


def test_a_stage_that_two_beats_in_a_row_do_not_name_is_missing() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    assert world.beat("b") == []  # this beat may be older than the stage
    assert running.state is PipelineState.READY
    world.beat("b")
    assert (running.state, running.message) == (
        PipelineState.DEGRADED,
        "stage 1 of 2 on worker b is gone: its worker holds it no longer",
    )


def test_a_missing_worker_is_named_before_the_neighbours_that_broke_for_want_of_it() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.beat("a", BROKEN, message="lost peer b")
    assert running.message == "stage 0 of 2 on worker a is broken: lost peer b"
    world.lose("b")
    assert running.message == "stage 1 of 2 on worker b is gone: its process has ended"


def test_what_a_broken_stage_says_of_another_is_the_reason() -> None:
    """The first to report is a neighbour of the one that is lost: no error may name it as the culprit meanwhile."""
    world = World("a", "b")
    running = world.run("a", "b")
    lost = "stage 1 of 2 on worker b is gone: its connection closed"
    world.beat("a", BROKEN, message=lost)
    assert running.message == lost


def test_the_stage_that_broke_first_is_named_not_those_that_broke_for_want_of_it() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.beat("b", BROKEN, message="out of memory", first=1)
    world.beat("a", BROKEN, message="another stage is lost")
    assert running.message == "stage 1 of 2 on worker b is broken: out of memory"
    world.beat("b", SERVING, first=1)
    assert running.message == "stage 0 of 2 on worker a is broken: another stage is lost"


def test_a_broken_ring_whose_stages_are_all_there_is_connected_again_ever_more_rarely() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.beat("a", BROKEN)
    assert world.wanted("b")[0].degraded
    tried = []
    for quarter in range(200):
        now = quarter / 4
        changes = world.deployments.tick(now)
        if Mend("id-m") in changes:
            assert not world.wanted("a")[0].degraded  # or the head would break its new ring at once
            tried.append(now)
    gaps = [round(after - before) for before, after in pairwise(tried)]
    assert tried[0] == 1.0 and gaps[:3] == [4, 6, 10]
    world.beat("a", SERVING)
    assert running.state is PipelineState.READY
    assert not any(Mend("id-m") in world.deployments.tick(100.0 + second) for second in range(60))


def test_a_ring_with_a_missing_stage_is_not_connected_again() -> None:
    world = World("a", "b")
    world.run("a", "b")
    world.lose("b")
    world.beat("a", BROKEN)
    assert not any(Mend("id-m") in world.deployments.tick(float(second)) for second in range(60))


def test_a_restarted_controller_waits_for_every_stage_and_withdraws_nothing_meanwhile() -> None:
    world = World()
    world.deployments.add(record("a", "b"), settle_by=5.0)
    kept = world.deployments.find("m")
    assert kept.state is PipelineState.DEPLOYING
    assert kept.message == "the controller restarted: waiting for a, waiting for b"
    world.join("a")
    world.beat("a", SERVING)
    assert (kept.progress, world.wanted("a")[0].degraded) == (0.5, False)
    world.join("b")
    assert kept.state is PipelineState.DEPLOYING
    world.beat("b", SERVING, first=1)
    assert (kept.state, kept.message) == (PipelineState.READY, "")


def test_a_restarted_controller_gives_up_waiting_for_a_worker() -> None:
    world = World()
    world.deployments.add(record("a", "b"), settle_by=5.0)
    world.join("a")
    world.beat("a", SERVING)
    assert world.deployments.tick(4.9) == []
    assert PipelineChanged("id-m") in world.deployments.tick(5.0)
    kept = world.deployments.find("m")
    assert (kept.state, kept.message) == (
        PipelineState.DEGRADED,
        "stage 1 of 2 on worker b is gone: its worker left the cluster",
    )


def test_a_restarted_controller_sees_at_once_that_a_worker_restarted_too() -> None:
    world = World()
    world.deployments.add(record("a", "b"), settle_by=5.0)
    world.join("b", incarnation=9)
    kept = world.deployments.find("m")
    assert kept.state is PipelineState.DEPLOYING
    gone = "stage 1 of 2 on worker b is gone: its worker restarted"
    assert kept.message == f"the controller restarted: {gone}, waiting for a"
    assert not reloads(world, 4.9)
    world.join("a", incarnation=9)
    assert reloads(world, 4.9) == [4.9]  # nothing to wait for: all workers are there


def test_what_a_restarted_worker_held_is_loaded_again_once_all_workers_are_up() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.lose("b")
    assert not reloads(world, *range(60))
    world.join("b", incarnation=8)
    assert running.state is PipelineState.DEGRADED
    assert reloads(world, 60.0, 61.0, 62.0) == [60.0]
    gone = "stage 1 of 2 on worker b is gone: its worker restarted"
    assert (running.state, running.message, running.progress) == (PipelineState.DEPLOYING, f"loading again: {gone}", 0)
    assert not world.wanted("a")[0].degraded
    moved = replace(record("a", "b", epoch=2), stages=(stage(0, "a"), stage(1, "b", 8)))
    world.beat("a", SERVING, epoch=2)
    world.beat("b", SERVING, epoch=2, first=1)
    world.deployments.update(moved)
    assert world.deployments.reloaded("id-m") == []
    assert (running.state, running.message) == (PipelineState.READY, "")


def test_a_load_again_that_fails_is_tried_ever_more_rarely_and_not_for_ever() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.join("b", incarnation=8)
    tried = []
    for second in range(400):
        if reloads(world, float(second)):
            tried.append(second)
            world.deployments.reloaded("id-m", f"no file, try {len(tried)}")
            assert running.state is PipelineState.DEGRADED
    assert [after - before for before, after in pairwise(tried)] == [2, 3, 5, 9, 17, 31, 31]
    gone = "stage 1 of 2 on worker b is gone: its worker restarted"
    story = "loading it again failed 8 times, the last attempt: rebalance it, or restart a worker: no file, try 8"
    assert running.message == f"{gone}; {story}"
    assert world.wanted("a")[0].reason == gone
    world.join("b", incarnation=9)
    assert reloads(world, 400.0) == [400.0]


def test_nothing_is_loaded_again_beside_a_rebalance_or_on_a_worker_that_drains() -> None:
    world = World("a", "b")
    world.run("a", "b")
    world.join("b", incarnation=8)
    world.deployments.update(replace(record("a", "b"), next_stages=(stage(0, "a"), stage(1, "b", 8))))
    assert not reloads(world, 1.0, 2.0)
    world.deployments.update(record("a", "b"))
    world.drain("a", SERVING)
    assert not reloads(world, 3.0, 4.0)
    world.beat("a", SERVING)
    assert reloads(world, 5.0) == [5.0]
    world.deployments.reloaded("id-m")  # other work had begun: that is no failure
    assert world.deployments.find("m").message == "stage 1 of 2 on worker b is gone: its worker restarted"
    assert reloads(world, 5.5, 6.0, 6.5) == [6.5]


def test_a_pipeline_with_a_worker_that_drains_takes_nothing_new_and_goes_on() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    changes = world.drain("b", SERVING, first=1)
    closing = "stage 1 of 2 on worker b is closing: its worker is about to end"
    assert changes == [PipelineChanged("id-m"), WantedChanged("worker/a"), WantedChanged("worker/b")]
    assert (running.state, running.message) == (PipelineState.DEGRADED, closing)
    assert world.wanted("a") == [Wanted(StageKey("id-m", 1, 0), degraded=False, closing=True, reason=closing)]
    assert not [each for second in range(60) for each in world.deployments.tick(float(second))]
    world.lose("b")
    assert (world.wanted("a")[0].degraded, world.wanted("a")[0].closing) == (True, False)


def test_a_stage_that_nobody_wants_is_an_orphan_now_and_every_fifth_beat() -> None:
    world = World("a")
    orphan = Orphan("worker/a", StageKey("id-m", 1, 0))
    found = [orphan in world.beat("a", SERVING) for _ in range(11)]
    assert [beat for beat, is_orphan in enumerate(found) if is_orphan] == [0, 5, 10]
    assert orphan not in world.beat("a", StageState.UNLOADING)


def test_stages_of_a_deploy_and_of_a_rebalance_in_progress_are_wanted() -> None:
    world = World("a", "b")
    world.deployments.add(record("a", phase=Phase.DEPLOYING))
    assert world.beat("a", LOADING) == []
    world.deployments.update(replace(record("a"), next_stages=(stage(0, "b"),)))
    assert world.wanted("b") == [Wanted(StageKey("id-m", 2, 0), degraded=False)]
    assert world.beat("b", LOADED, epoch=2) == []
    assert Orphan("worker/b", StageKey("id-m", 1, 0)) in world.beat("b", LOADED, epoch=1)


def test_an_undeploying_pipeline_wants_nothing_and_its_workers_hear_it() -> None:
    world = World("a")
    world.run("a")
    assert WantedChanged("worker/a") in world.deployments.update(record("a", phase=Phase.UNDEPLOYING))
    assert world.wanted("a") == []
    assert world.deployments.find("m").state is PipelineState.UNDEPLOYING
    assert world.beat("a", SERVING) == []  # not an orphan: the undeploy is at it
    removed = world.deployments.remove("id-m")
    assert isinstance(removed[0], PipelineRemoved)
    with pytest.raises(NotFound, match="there is no pipeline 'm'; there are: none"):
        world.deployments.find("m")


def test_a_switch_to_another_epoch_forgets_what_was_missing() -> None:
    world = World("a", "b")
    running = world.run("a", "b")
    world.lose("b")
    world.beat("a", SERVING, epoch=2)
    world.deployments.update(record("a", epoch=2))
    assert (running.state, running.record.epoch) == (PipelineState.READY, 2)


def test_a_name_is_given_once() -> None:
    world = World("a")
    world.run("a")
    with pytest.raises(
        AlreadyExists, match=r"there is a pipeline 'm' \(ready\): undeploy it first \(`eldric-cli undeploy m`\)"
    ):
        world.deployments.add(replace(record("a"), id="other"))


def test_memory_is_taken_by_the_promise_until_the_report_and_by_strays_too() -> None:
    world = World("a")
    committed = world.deployments.committed_bytes
    world.deployments.add(record("a", phase=Phase.DEPLOYING))
    assert committed(world.node("a")) == 200
    world.beat("a", LOADING)
    assert committed(world.node("a")) == 200
    world.beat("a", SERVING)
    assert committed(world.node("a")) == 150
    assert committed(world.node("a"), without="id-m") == 0
    world.beat("a", SERVING, SERVING)
    assert committed(world.node("a")) == 300
    world.join("a", incarnation=8)
    assert committed(world.node("a")) == 0


def test_stages_that_still_load_are_not_said_to_be_missing() -> None:
    world = World("a")
    world.deployments.add(record("a", phase=Phase.DEPLOYING))
    for _ in range(5):
        world.beat("a", LOADING)
    assert [verdict.reason for verdict in world.deployments.find("m").verdicts] == [""]
    world.deployments.update(record("a"))
    assert world.deployments.find("m").state is PipelineState.READY


def test_progress_of_a_deploy_is_news() -> None:
    world = World("a")
    world.deployments.add(record("a", phase=Phase.DEPLOYING))
    assert world.deployments.note("id-m", "loading", 0.5) == [PipelineChanged("id-m")]
    assert world.deployments.find("m").progress == 0.5
    assert world.deployments.note("gone", "loading", 0.5) == []
