"""By which transports the links of a ring go, and how a ring gets them when some fail."""

from dataclasses import dataclass, replace

import pytest

from eldric.controller.linking import Linking, Wired, wired
from eldric.controller.links import LinkChoice, alternatives, better_choices, far_stages, ring_choices
from eldric.controller.nodes import Endpoint, StageKey, StageReport, StageState
from eldric.controller.pipelines import StageRecord
from eldric.errors import NotReady, Unavailable
from eldric.v1 import common_pb2, stage_pb2


@dataclass(frozen=True)
class Worker:
    name: str
    transports: tuple[str, ...] = ("zmq",)
    host: str = ""
    edge_id: str = ""


FULL = ("shm", "ucx", "zmq", "relay")


@pytest.mark.parametrize(
    ("sender", "receiver", "schemes"),
    [
        (Worker("a", FULL, "h1"), Worker("b", FULL, "h1"), ("shm", "ucx", "zmq")),
        (Worker("a", FULL, "h1"), Worker("b", FULL, "h2"), ("ucx", "zmq")),
        (Worker("a", FULL), Worker("b", FULL), ("ucx", "zmq")),  # a host that is not known is no common one
        (Worker("a", FULL), Worker("a", FULL), ("shm", "ucx", "zmq")),  # two stages of one worker
        (Worker("a", FULL, edge_id="edge/e"), Worker("b", FULL), ("ucx", "zmq", "relay")),  # found by trying
        (Worker("a", FULL, "h1"), Worker("b", ("zmq",), "h1"), ("zmq",)),
        (Worker("a", ("zmq", "relay")), Worker("b", ("relay",), edge_id="edge/e"), ("relay",)),
        (Worker("a", ("zmq", "pigeon")), Worker("b", ("zmq", "pigeon")), ("zmq", "pigeon")),
    ],
)
def test_a_link_may_go_by_what_both_ends_offer_best_first(
    sender: Worker, receiver: Worker, schemes: tuple[str, ...]
) -> None:
    assert alternatives(sender, receiver) == schemes
    assert alternatives(receiver, sender, "auto") == schemes


def test_an_operator_names_the_one_transport_of_all_links() -> None:
    a, b = Worker("a", FULL, "h1"), Worker("b", FULL, "h1")
    assert alternatives(a, b, "zmq") == ("zmq",)
    assert alternatives(a, b, "shm") == ("shm",)
    with pytest.raises(NotReady, match="a and b are not on one host, which shm needs"):
        alternatives(a, replace(b, host="h2"), "shm")
    with pytest.raises(NotReady, match=r"no tensor transport 'ucx' in common \(a: shm, ucx.*; b: zmq\)"):
        alternatives(a, Worker("b"), "ucx")


def test_ends_without_a_common_transport_are_named_with_what_they_offer() -> None:
    with pytest.raises(NotReady, match=r"no tensor transport in common \(a: ucx; b: none\)"):
        alternatives(Worker("a", ("ucx",)), Worker("b", ()))
    with pytest.raises(NotReady, match="a and b are not on one host, which shm needs"):
        alternatives(Worker("a", ("shm",), "h1"), Worker("b", ("shm",), "h2"))


def test_every_link_of_a_ring_has_a_choice_of_its_own() -> None:
    a, b, c = Worker("a", FULL, "h1"), Worker("b", FULL, "h1"), Worker("c", ("ucx", "zmq"), "h2")
    assert [choice.scheme for choice in ring_choices([a, b, c])] == ["shm", "ucx", "ucx"]
    assert [choice.others for choice in ring_choices([a, b, c])] == [("ucx", "zmq"), ("zmq",), ("zmq",)]
    assert ring_choices([a, b, c], "zmq") == (LinkChoice("zmq"),) * 3
    assert ring_choices([a]) == ()


def test_a_link_to_a_worker_behind_an_edge_takes_the_edge_first() -> None:
    a, b = Worker("a", FULL, "h1"), Worker("b", FULL, "h2", edge_id="edge/e")
    there, back = ring_choices([a, b])
    assert (there, back) == (LinkChoice("relay", ("ucx", "zmq")), LinkChoice("ucx", ("zmq", "relay")))
    assert ring_choices([a, b], "zmq") == (LinkChoice("zmq"),) * 2
    assert [choice.scheme for choice in ring_choices([replace(a, host="h2"), b])] == ["shm", "shm"]
    assert there.resumed("relay", "") == there
    assert there.resumed("zmq", "") == LinkChoice("zmq", ("relay",))


def test_stages_are_far_where_a_network_lies_between_that_only_an_edge_crosses() -> None:
    a, b, c, d = (Worker(name, FULL, f"h-{name}") for name in "abcd")
    assert far_stages([a, b, c, d]) == (False,) * 4
    assert far_stages([a, replace(b, edge_id="edge/e"), c, d]) == (True, True, True, False)
    home = replace(a, host="h", edge_id="edge/e"), replace(b, host="h", edge_id="edge/e")
    assert far_stages(home) == (False, False)
    assert far_stages([home[0]]) == (False,)


def test_better_choices_are_those_before_what_a_link_has_and_then_that() -> None:
    a, b = Worker("a", FULL, "h1"), Worker("b", FULL, "h2", edge_id="edge/e")
    assert better_choices([a, b], "", ["relay", "zmq"]) == (
        LinkChoice("ucx", ("zmq", "relay")),
        LinkChoice("ucx", ("zmq",)),
    )
    assert better_choices([a, b], "auto", ["ucx", "ucx"]) == (LinkChoice("ucx"),) * 2
    assert better_choices([a, b], "zmq", ["zmq", "zmq"]) == (LinkChoice("zmq"),) * 2
    assert better_choices([a, b], "", ["pigeon", "zmq"])[0] == LinkChoice("pigeon")
    assert better_choices([a], "", []) == ()


def test_a_choice_falls_back_until_nothing_is_left_and_keeps_the_reasons() -> None:
    choice = LinkChoice("ucx", ("zmq", "relay")).failed("no such device")
    assert (choice.scheme, choice.others, choice.fallback) == ("zmq", ("relay",), "ucx failed: no such device")
    choice = choice.failed("refused")
    assert choice == LinkChoice("relay", (), "ucx failed: no such device; zmq failed: refused")
    with pytest.raises(Unavailable, match="no such device; zmq failed: refused; relay failed: no edge"):
        choice.failed("no edge")
    with pytest.raises(Unavailable, match=r"^refused$"):  # where there was no choice, none is spoken of
        LinkChoice("zmq").failed("refused")


def test_a_choice_goes_on_where_the_link_is_and_begins_anew_where_it_may_not_be_any_more() -> None:
    choice = LinkChoice("shm", ("ucx", "zmq"))
    assert choice.resumed("ucx", "shm failed: full") == LinkChoice("ucx", ("zmq",), "shm failed: full")
    assert choice.resumed("relay", "zmq failed: refused") == choice
    assert choice.resumed("shm", "") == choice


def stage_on(index: int) -> StageRecord:
    return StageRecord(index, f"w{index}", 1, index, index + 1, 1, 1, 1, 3)


def endpoint_of(scheme: str, index: int) -> Endpoint:
    return Endpoint(scheme, f"{scheme}://h:{index}", f"{scheme}-key-{index}")


def ring_of(*choices: LinkChoice, have: str = "zmq") -> Linking:
    """Stages that receive and send by one transport so far."""
    stages = tuple(stage_on(index) for index in range(len(choices)))
    held = [endpoint_of(have, index) for index in range(len(choices))]
    return Linking("p", 1, stages, tuple(Wired(each, have, each.public_key) for each in held), choices)


def answer_to(request: stage_pb2.OpenLinksRequest, **problems: str) -> stage_pb2.OpenLinksResponse:
    """Of a stage that opens what it is asked for, but for where there is a problem: that end stays with zmq."""
    receive = "zmq" if "receive_problem" in problems else request.receive
    send = "zmq" if "send_problem" in problems else request.send
    endpoint = endpoint_of(receive, request.index)
    return stage_pb2.OpenLinksResponse(
        endpoint=common_pb2.TensorEndpoint(
            scheme=endpoint.scheme, address=endpoint.address, public_key=endpoint.public_key
        ),
        sender_scheme=send,
        sender_key=f"{send}-key-{request.index}",
        **problems,
    )


def test_stages_that_have_what_they_need_are_asked_nothing() -> None:
    assert ring_of(LinkChoice("zmq"), LinkChoice("zmq")).open_requests() == {}
    alone = Linking("p", 1, (stage_on(0),), (Wired(Endpoint("zmq", "a", "k"), "zmq", "k"),), ())
    assert alone.open_requests() == {}
    assert not alone.connect_request(stage_on(0)).HasField("next")


def test_each_stage_is_asked_for_its_two_links_and_told_the_key_that_the_one_before_sends_with() -> None:
    ring = ring_of(LinkChoice("shm", ("zmq",)), LinkChoice("zmq"), LinkChoice("zmq"))
    requests = ring.open_requests()
    assert {index: (each.receive, each.send) for index, each in requests.items()} == {
        0: ("zmq", "shm"),
        1: ("shm", "zmq"),
    }
    ring, failed = ring.opened({index: answer_to(request) for index, request in requests.items()})
    assert not failed and not ring.open_requests()
    told = [ring.connect_request(stage) for stage in ring.stages]
    assert [each.next.address for each in told] == ["shm://h:1", "zmq://h:2", "zmq://h:0"]
    assert [list(each.allowed_keys) for each in told] == [["zmq-key-2"], ["shm-key-0"], ["zmq-key-1"]]
    assert [each.try_ms > 0 for each in told] == [True, False, False]  # patience where there is no alternative
    assert all(list(each.workers) == ["w0", "w1", "w2"] for each in told)


def test_a_link_that_cannot_be_opened_falls_back_and_says_at_whose_end() -> None:
    ring = ring_of(LinkChoice("ucx", ("zmq",)), LinkChoice("zmq"))
    requests = ring.open_requests()
    ring, failed = ring.opened({0: answer_to(requests[0]), 1: answer_to(requests[1], receive_problem="not installed")})
    assert failed == {0: "w1: not installed"}
    ring = ring.fell_back(failed)
    assert ring.choices[0] == LinkChoice("zmq", (), "ucx failed: w1: not installed")
    again = ring.open_requests()
    assert {index: (each.receive, each.send) for index, each in again.items()} == {0: ("zmq", "zmq")}
    ring, failed = ring.opened({0: answer_to(again[0])})
    assert not failed and not ring.open_requests()
    assert ring.connect_request(ring.stages[0]).fallback == "ucx failed: w1: not installed"


def test_a_link_whose_both_ends_fail_falls_back_once() -> None:
    ring = ring_of(LinkChoice("ucx", ("zmq",)), LinkChoice("zmq"))
    problems = {0: {"send_problem": "no device"}, 1: {"receive_problem": "no device either"}}
    answers = {index: answer_to(request, **problems[index]) for index, request in ring.open_requests().items()}
    ring, failed = ring.opened(answers)
    assert failed == {0: "w0: no device"}
    assert ring.fell_back(failed).choices[0].scheme == "zmq"


def test_a_link_that_cannot_fall_back_names_its_stage_and_every_reason() -> None:
    ring = ring_of(LinkChoice("zmq", (), "ucx failed: w0: no device"), LinkChoice("zmq"))
    with pytest.raises(Unavailable, match="stage 0 on w0: ucx failed: w0: no device; zmq failed: refused"):
        ring.fell_back({0: "refused"})
    assert ring.next_round().round == 1


def test_a_stage_sends_with_what_it_receives_by_until_it_says_otherwise() -> None:
    endpoint = Endpoint("zmq", "zmq://h:1", "k")
    report = StageReport(StageKey("p", 1, 0), StageState.LOADED, endpoint=endpoint)
    assert wired(report) == Wired(endpoint, "zmq", "k")
    assert wired(replace(report, sender_scheme="shm", sender_key="s")) == Wired(endpoint, "shm", "s")
    assert wired(replace(report, endpoint=None)) is None


def test_links_beside_are_made_for_the_next_round_and_the_keys_in_use_stay_allowed() -> None:
    present = ring_of(LinkChoice("zmq", (), "shm failed: full"), LinkChoice("zmq"))
    ring = present.beside((LinkChoice("shm", ("zmq",)), LinkChoice("zmq")))
    requests = ring.open_requests()
    assert all(request.beside for request in requests.values()) and set(requests) == {0, 1}
    ring, _ = ring.opened({index: answer_to(request) for index, request in requests.items()})
    told = ring.connect_request(ring.stages[1], stage_pb2.BESIDE)
    assert (list(told.allowed_keys), told.phase, told.try_ms > 0) == (
        ["shm-key-0", "zmq-key-0"],
        stage_pb2.BESIDE,
        True,
    )
    told = ring.connect_request(ring.stages[1], stage_pb2.SWITCH)
    assert (list(told.allowed_keys), told.phase, told.try_ms) == (["shm-key-0"], stage_pb2.SWITCH, 0)
    assert ring.explained(present).choices == ring.choices
    failed = ring.fell_back({0: "still full"})
    assert (
        failed.schemes == present.schemes and failed.explained(present).choices[0].fallback == "shm failed: still full"
    )
    untried = present.beside(present.choices).explained(present)
    assert untried.choices[0].fallback == "shm failed: full"
    drop = ring.drop_request(ring.stages[1])
    assert (drop.index, drop.beside, drop.receive, drop.send) == (1, True, "", "")
