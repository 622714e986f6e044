"""The registry: what happens to nodes, told as events, and what the registry makes of it."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from eldric.controller.nodes import Memory, NodeInfo, NodeState, StageKey, StageReport, StageState
from eldric.controller.registry import EDGE_LEASE_S, LOST_KEPT_S, Node, NodeChanged, NodeRemoved, Probe, Registry
from eldric.errors import AlreadyExists, NotFound, VersionMismatch

A = "worker/a"


def info(name: str = "a", incarnation: int = 7, protocol: int = 1) -> NodeInfo:
    return NodeInfo("worker", name, f"{name}:9890", f"https://{name}:8890", "0.1.0", protocol, 4711, incarnation)


def joined(now: float = 0.0) -> tuple[Registry, int]:
    """A registry with worker a, its link open, its first beat there."""
    registry = Registry(protocol=1, beat_interval_s=1.0, lease_s=3.0)
    registry.tick(now)
    registry.register(info(), now, 1000.0)
    link = registry.link_opened(A, 7)
    registry.beat(A, 7, 1, now)
    return registry, link


def node(registry: Registry) -> Node:
    found = registry.get(A)
    assert found is not None
    return found


def pass_time(registry: Registry, start: float, end: float) -> list[object]:
    """Ticks four times a second, as the controller does."""
    events: list[object] = []
    for quarter in range(int(start * 4) + 1, int(end * 4) + 1):
        events += registry.tick(quarter / 4)
    return events


def test_a_node_that_beats_stays_up() -> None:
    registry, _ = joined()
    for second in range(1, 20):
        assert pass_time(registry, second - 1, second) == []
        assert registry.beat(A, 7, second + 1, float(second)) == []
    assert node(registry).state is NodeState.UP


def test_one_missed_beat_changes_nothing() -> None:
    registry, _ = joined()
    assert pass_time(registry, 0, 1.9) == []
    registry.beat(A, 7, 2, 1.95)
    assert pass_time(registry, 1.95, 3.9) == []


def test_a_closed_link_makes_a_node_suspect_at_once_and_a_refused_probe_lost() -> None:
    registry, link = joined()
    assert registry.link_closed(A, link) == [NodeChanged(A), Probe(A, 7, "a:9890")]
    assert node(registry).state is NodeState.SUSPECT
    assert registry.probed(A, 7, False, 0.1) == [NodeChanged(A)]
    assert (node(registry).state, node(registry).reason) == (NodeState.LOST, "its process has ended")


def test_a_closed_link_of_a_healthy_process_is_forgiven_until_its_lease_ends() -> None:
    registry, link = joined()
    registry.link_closed(A, link)
    assert registry.probed(A, 7, True, 0.1) == [NodeChanged(A)]
    assert node(registry).state is NodeState.UP
    pass_time(registry, 0, 3.25)
    assert (node(registry).state, node(registry).reason) == (NodeState.LOST, "no beat for 3.2 s")


def test_a_process_that_does_not_answer_after_its_link_closed_is_probed_twice() -> None:
    registry, link = joined()
    registry.link_closed(A, link)
    assert registry.probed(A, 7, None, 0.2) == [Probe(A, 7, "a:9890")]
    assert registry.probed(A, 7, None, 0.4) == [NodeChanged(A)]
    assert node(registry).state is NodeState.LOST


def test_a_late_beat_is_probed_once_and_a_silent_node_with_a_link_keeps_its_lease() -> None:
    registry, _ = joined()
    assert pass_time(registry, 0, 2.25) == [NodeChanged(A), Probe(A, 7, "a:9890")]
    assert registry.probed(A, 7, None, 2.45) == []
    assert node(registry).state is NodeState.SUSPECT
    assert pass_time(registry, 2.5, 3.0) == []
    assert pass_time(registry, 3.0, 3.25) == [NodeChanged(A)]
    assert node(registry).state is NodeState.LOST


def test_a_node_behind_an_edge_may_be_silent_while_its_tunnel_comes_back() -> None:
    registry, _ = joined()
    registry.register(replace(info(), edge_id="edge/e"), 0.0, 1000.0)
    pass_time(registry, 0, 3.0 + EDGE_LEASE_S)
    assert node(registry).state is NodeState.SUSPECT
    assert pass_time(registry, 3.0 + EDGE_LEASE_S, 3.25 + EDGE_LEASE_S) == [NodeChanged(A)]
    assert node(registry).state is NodeState.LOST


def test_a_beat_ends_the_suspicion_and_brings_a_lost_node_back() -> None:
    registry, link = joined()
    registry.link_closed(A, link)
    assert registry.beat(A, 7, 2, 0.1) == [NodeChanged(A)]
    assert registry.probed(A, 7, False, 0.2) == []  # the probe was about the time before
    pass_time(registry, 0, 5)
    assert node(registry).state is NodeState.LOST
    assert registry.beat(A, 7, 3, 5.0) == [NodeChanged(A)]
    assert node(registry).state is NodeState.UP


def test_the_close_of_an_older_link_means_nothing() -> None:
    registry, old = joined()
    new = registry.link_opened(A, 7)
    assert registry.link_closed(A, old) == []
    assert registry.link_closed(A, new) != []


def test_a_node_that_was_never_registered_is_sent_to_register() -> None:
    registry = Registry(1, 1.0, 3.0)
    with pytest.raises(NotFound, match="worker/a is not registered"):
        registry.link_opened(A, 7)
    registry.register(info(), 0.0, 0.0)
    with pytest.raises(NotFound, match="this process of worker/a"):
        registry.beat(A, 8, 1, 0.0)


def test_another_protocol_version_is_refused_with_both_named() -> None:
    with pytest.raises(VersionMismatch, match="speaks protocol version 2, this cluster speaks 1"):
        Registry(1, 1.0, 3.0).register(info(protocol=2), 0.0, 0.0)


def test_a_restarted_process_takes_the_name_and_its_stages_are_gone() -> None:
    registry, link = joined()
    report = StageReport(StageKey("p", 1, 0), StageState.SERVING)
    registry.beat(A, 7, 2, 0.5, stages=[report])
    assert registry.register(info(incarnation=8), 1.0, 1001.0) == [NodeChanged(A)]
    assert not node(registry).stages
    assert registry.link_closed(A, link) == []
    assert node(registry).registered_at == 1001.0


def test_two_processes_of_one_name_do_not_take_turns() -> None:
    registry, _ = joined()
    registry.register(info(incarnation=8), 1.0, 0.0)
    with pytest.raises(AlreadyExists, match="another process"):
        registry.beat(A, 7, 2, 1.1)
    with pytest.raises(AlreadyExists, match="another process"):
        registry.register(info(), 1.1, 0.0)
    pass_time(registry, 1.0, 5.0)
    assert registry.register(info(), 5.0, 0.0) == [NodeChanged(A)]  # the newer one is lost: the name is free


def test_a_beat_that_comes_late_over_an_old_link_does_not_undo_a_newer_one() -> None:
    registry, _ = joined()
    report = StageReport(StageKey("p", 1, 0), StageState.SERVING)
    registry.beat(A, 7, 5, 0.5, stages=[report])
    registry.beat(A, 7, 4, 0.6, draining=True)
    assert list(node(registry).stages) == [report.key]
    assert node(registry).state is NodeState.UP


def test_a_draining_node_says_so() -> None:
    registry, _ = joined()
    assert registry.beat(A, 7, 2, 1.0, draining=True) == [NodeChanged(A)]
    assert node(registry).state is NodeState.DRAINING


def test_a_node_that_leaves_is_removed_at_once_and_a_lost_one_after_minutes() -> None:
    registry, _ = joined()
    (event,) = registry.deregister(A)
    assert isinstance(event, NodeRemoved) and event.node.id == A
    assert registry.get(A) is None and registry.deregister(A) == []
    registry, link = joined()
    registry.link_closed(A, link)
    registry.probed(A, 7, False, 1.0)
    assert pass_time(registry, 1.0, LOST_KEPT_S) == []
    assert isinstance(pass_time(registry, LOST_KEPT_S, LOST_KEPT_S + 2)[0], NodeRemoved)


def test_time_in_which_the_controller_itself_stood_still_is_not_held_against_the_nodes() -> None:
    registry, _ = joined()
    pass_time(registry, 0, 1)
    assert registry.tick(3601.0) == []
    assert node(registry).state is NodeState.UP
    assert pass_time(registry, 3601.0, 3604.0) != []


def test_the_controller_itself_has_no_lease_and_cannot_be_removed() -> None:
    registry = Registry(1, 1.0, 3.0)
    registry.register(info(), 0.0, 0.0, permanent=True)
    assert pass_time(registry, 0, 30) == []
    assert registry.deregister(A) == []


def test_memory_of_stages_that_were_unloaded_counts_no_more() -> None:
    registry, _ = joined()
    kept, gone = (StageReport(StageKey("p", 1, index), StageState.SERVING, memory=Memory(kv=100)) for index in (0, 1))
    registry.beat(A, 7, 2, 1.0, stages=[kept, gone], memory_used_bytes=200)
    registry.drop_stages(A, [gone.key])
    assert (list(node(registry).stages), node(registry).memory_used_bytes) == ([kept.key], 100)


class Histories(RuleBasedStateMachine):
    """Any order of events: a node is lost only for a reason, and one that beats in time never is."""

    def __init__(self) -> None:
        super().__init__()
        self.registry, self.link = joined()
        self.now, self.sequence, self.beaten_at = 0.0, 1, 0.0
        self.refused = False

    @rule(quarters=st.integers(1, 8))
    def time_passes(self, quarters: int) -> None:
        for _ in range(quarters):
            self.now += 0.25
            self.registry.tick(self.now)

    @rule()
    def beat(self) -> None:
        self.sequence += 1
        self.registry.beat(A, 7, self.sequence, self.now)
        self.beaten_at, self.refused = self.now, False

    @rule()
    def link_opens(self) -> None:
        self.link = self.registry.link_opened(A, 7)

    @rule()
    def link_closes(self) -> None:
        self.registry.link_closed(A, self.link)

    @rule(alive=st.sampled_from([True, False, None]))
    def probe_ends(self, alive: bool | None) -> None:
        suspect = node(self.registry).state is NodeState.SUSPECT
        self.registry.probed(A, 7, alive, self.now)
        self.refused |= suspect and alive is not True

    @invariant()
    def lost_only_for_a_reason(self) -> None:
        state = node(self.registry).state
        silence = self.now - self.beaten_at
        if silence > 3.0:
            assert state is NodeState.LOST
        elif not self.refused:
            assert state is not NodeState.LOST


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase
