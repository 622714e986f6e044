"""The planner: written scenarios, then what must hold for any cluster and model."""

import re
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldric.controller.costs import ModelShape, Options, readable
from eldric.controller.planner import Order, Plan, plan
from eldric.controller.seating import WorkerView, natural
from eldric.engine.shard import ModelCosts
from eldric.errors import EldricError, InvalidRequest, NotEnoughMemory, NotReady, VersionMismatch

MIB = 1 << 20
GIB = 1 << 30


def model(layers: int = 32, layer_bytes: int = 200 * MIB, **changes: int) -> ModelShape:
    """A model of about 7B parameters: an embedding and an output matrix of 100 MiB each."""
    numbers = dict(
        head_bytes=100 * MIB,
        tail_bytes=100 * MIB,
        shared_bytes=0,
        every_bytes=256,
        kv_bytes_per_cell_per_layer=2 * 2 * 8 * 128,
        row_bytes=4 * (2 * 4096 + 3 * 11008),
        logits_row_bytes=4 * 32000,
    )
    return ModelShape("llama", ModelCosts((layer_bytes,) * layers, **(numbers | changes)), 4096)


def order(stages: int = 0, context: int = 2048, slots: int = 2, **changes: object) -> Order:
    return Order(Options(context=context, slots=slots), stages=stages, **changes)  # type: ignore[arg-type]


def cluster(*gib: float, **changes: object) -> list[WorkerView]:
    views = enumerate(gib, start=1)
    return [WorkerView(f"worker-{number}", int(size * GIB), **changes) for number, size in views]  # type: ignore[arg-type]


def layers_of(made: Plan) -> list[int]:
    return [stage.end - stage.start for stage in made.stages]


def workers_of(made: Plan) -> list[str]:
    return [stage.worker for stage in made.stages]


def test_a_model_that_fits_one_worker_takes_one() -> None:
    made = plan(cluster(64, 64, 64), model(), order())
    assert layers_of(made) == [32]
    assert made.excluded == (("worker-2", "not needed"), ("worker-3", "not needed"))


def test_the_fewest_workers_that_fit_are_taken_the_roomiest_first() -> None:
    made = plan(cluster(2, 6, 2, 6, 1), model(), order())
    assert workers_of(made) == ["worker-2", "worker-4"]
    assert sum(layers_of(made)) == 32


def test_three_equal_workers_share_a_model_evenly() -> None:
    made = plan(cluster(16, 16, 16), model(30, tail_bytes=256), order(stages=3))
    assert layers_of(made) == [10, 10, 10]
    assert workers_of(made) == ["worker-1", "worker-2", "worker-3"]


def test_the_output_matrix_costs_the_tail_layers_because_it_is_read_for_every_token() -> None:
    made = plan(cluster(64, 64), model(32, tail_bytes=800 * MIB), order(stages=2))
    assert layers_of(made) == [18, 14]


def test_the_embedding_costs_the_head_room_but_no_time() -> None:
    roomy = plan(cluster(64, 64), model(32, head_bytes=800 * MIB, tail_bytes=256), order(stages=2))
    assert layers_of(roomy) == [16, 16]
    named = order(workers=("worker-1", "worker-2"))
    tight = plan(cluster(4.8, 8), model(32, head_bytes=800 * MIB, tail_bytes=256), named)
    assert layers_of(tight) == [14, 18]
    assert tight.stages[0].weights_bytes == 14 * 200 * MIB + 800 * MIB + 256


def test_a_tied_embedding_counts_in_head_and_tail_but_once_where_they_are_one() -> None:
    tied = model(8, shared_bytes=100 * MIB)
    one, two = (plan(cluster(64, 64), tied, order(stages=count)) for count in (1, 2))
    assert one.stages[0].weights_bytes == 8 * 200 * MIB + 100 * MIB + 256
    assert sum(stage.weights_bytes for stage in two.stages) == 8 * 200 * MIB + 200 * MIB + 512


def test_small_workers_take_what_their_memory_allows_and_large_ones_the_rest() -> None:
    made = plan(cluster(2, 4, 8), model(), order(stages=3))
    by_worker = {stage.worker: stage for stage in made.stages}
    assert by_worker["worker-1"].needed_bytes <= 0.8 * 2 * GIB
    assert by_worker["worker-1"].end - by_worker["worker-1"].start < 8
    assert by_worker["worker-3"].end - by_worker["worker-3"].start >= 12


def test_the_kv_cache_counts_layers_slots_and_whole_blocks_of_context() -> None:
    made = plan(cluster(64), model(4), order(context=1000, slots=3))
    assert made.stages[0].kv_bytes == 4 * 3 * 1024 * 2 * 8 * 128 * 2
    wide = Order(Options(context=1000, slots=3, kv_type="f32"))
    assert plan(cluster(64), model(4), wide).stages[0].kv_bytes == 2 * made.stages[0].kv_bytes


def test_a_second_copy_of_the_weights_is_allowed_where_there_is_room_for_it() -> None:
    named = order(workers=("worker-1", "worker-2", "worker-2"))
    first, *others = plan(cluster(4, 40), model(), named).stages
    assert first.needed_bytes < first.limit_bytes == first.available_bytes
    assert all(stage.limit_bytes == stage.needed_bytes + stage.weights_bytes for stage in others)
    mapped = plan(cluster(64), model(), Order(Options(context=64, weights="mapped")))
    assert mapped.stages[0].limit_bytes == mapped.stages[0].needed_bytes


def test_a_long_context_needs_more_workers() -> None:
    short, long = (plan(cluster(12, 12, 12, 12), model(), order(context=context)) for context in (2048, 65536))
    assert len(short.stages) == 1
    assert len(long.stages) == 3


def test_memory_that_is_promised_elsewhere_is_not_given_twice() -> None:
    busy = [*cluster(16, used_bytes=10 * GIB), WorkerView("worker-2", 12 * GIB)]
    made = plan(busy, model(), order())
    assert workers_of(made) == ["worker-2"]
    assert made.stages[0].available_bytes == int(0.8 * 12 * GIB)


def test_more_stages_than_workers_are_neighbours_on_shared_workers() -> None:
    made = plan(cluster(16, 16, 16), model(30, tail_bytes=256), order(stages=6))
    assert workers_of(made) == [f"worker-{number}" for number in (1, 1, 2, 2, 3, 3)]
    assert layers_of(made) == [5] * 6
    assert made.options.lanes == 6


def test_stages_share_a_worker_when_the_others_have_no_room_for_a_layer() -> None:
    made = plan(cluster(32, 0.1, 0.1), model(), order(stages=3))
    assert workers_of(made) == ["worker-1"] * 3


def test_named_workers_form_the_ring_in_their_order() -> None:
    made = plan(cluster(16, 16, 16), model(), order(workers=("worker-3", "worker-1")))
    assert workers_of(made) == ["worker-3", "worker-1"]
    assert made.excluded == (("worker-2", "not among the named workers"),)
    doubled = plan(cluster(16, 16), model(), order(workers=("worker-2", "worker-2", "worker-1")))
    assert workers_of(doubled) == ["worker-2", "worker-2", "worker-1"]


def test_fewer_stages_than_named_workers_take_the_roomiest_of_them() -> None:
    made = plan(cluster(8, 16, 16), model(), order(stages=2, workers=("worker-3", "worker-1", "worker-2")))
    assert workers_of(made) == ["worker-3", "worker-2"]


def test_given_layer_counts_are_kept_and_the_largest_share_finds_the_worker_that_holds_it() -> None:
    made = plan(cluster(3, 3, 16), model(), order(layers=(20, 6, 6)))
    assert layers_of(made) == [20, 6, 6]
    assert made.stages[0].worker == "worker-3"
    named = plan(cluster(16, 16), model(), order(layers=(31, 1), workers=("worker-2", "worker-1")))
    assert named.layout == (("worker-2", 0, 31), ("worker-1", 31, 32))


def test_too_little_memory_says_how_many_bytes_are_missing_where_and_after_what() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        plan(cluster(2, 3), model(), order())
    text = str(caught.value)
    found = re.search(r"\((\d+) bytes\) are missing.*; (worker-\d) has", text)
    assert found is not None and "2 stages need" in text and "2 workers have" in text
    assert "20% head room" in text and "the output matrix" in text
    # With so many bytes more on that worker it fits; with one megabyte less it does not.
    missing, short = int(found[1]), found[2]
    for less, fits in ((0, True), (MIB, False)):
        workers = [
            WorkerView(worker.name, worker.memory_bytes + (worker.name == short) * int((missing - less) / 0.8 + 2))
            for worker in cluster(2, 3)
        ]
        if fits:
            assert len(plan(workers, model(), order(stages=2)).stages) == 2
        else:
            with pytest.raises(NotEnoughMemory):
                plan(workers, model(), order(stages=2))


def test_a_single_named_worker_that_is_too_small_is_named() -> None:
    with pytest.raises(NotEnoughMemory, match=r"worker-1 has .* for layers 0 to 31 with the token embedding and"):
        plan(cluster(4, 64), model(), order(workers=("worker-1",)))


def test_given_layers_that_do_not_fit_say_which() -> None:
    with pytest.raises(NotEnoughMemory, match=r"layers 0 to 29 .* which need"):
        plan(cluster(4, 4), model(), order(layers=(30, 2)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(stages=33), "32 layers: it cannot be cut into 33 stages"),
        (dict(layers=(16, 15)), "add up to 31; llama has 32 layers"),
        (dict(layers=(32, 0)), "at least one layer"),
        (dict(layers=(16, 16), stages=3), "2 layer counts are given for 3 stages"),
        (dict(workers=("worker-1", "worker-2", "worker-1")), "side by side"),
    ],
)
def test_an_order_that_no_cluster_could_serve_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        plan(cluster(64, 64), model(), order(**wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [dict(context=0), dict(slots=0), dict(chunk=4097), dict(kv_type="q8"), dict(weights="gpu")]
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Options(**({"context": 64} | wrong))  # type: ignore[arg-type]


def test_an_empty_cluster_says_how_to_start_a_worker() -> None:
    with pytest.raises(NotReady, match="eldric-cli worker"):
        plan([], model(), order())


def test_workers_that_cannot_be_used_are_left_out_with_the_reason() -> None:
    workers = [
        WorkerView("a", 64 * GIB),
        WorkerView("b", 64 * GIB, unusable="is draining"),
        WorkerView("c", 64 * GIB, protocol=2),
    ]
    made = plan(workers, model(), order())
    assert made.excluded == (("b", "is draining"), ("c", "speaks protocol version 2, this cluster speaks 1"))
    with pytest.raises(NotReady, match="b cannot be used: is draining"):
        plan(workers, model(), order(workers=("b", "a")))
    with pytest.raises(NotReady, match="b: is draining"):
        plan(workers[1:2], model(), order())
    with pytest.raises(NotReady, match="no worker 'd'; there are: a, b, c"):
        plan(workers, model(), order(workers=("d",)))


def test_a_mixed_set_of_protocol_versions_is_refused_with_both_named() -> None:
    workers = [WorkerView("a", 64 * GIB), WorkerView("b", 64 * GIB, protocol=2)]
    with pytest.raises(VersionMismatch, match="b cannot be used: speaks protocol version 2, this cluster speaks 1"):
        plan(workers, model(), order(workers=("a", "b")))


def test_each_link_takes_the_best_transport_that_both_its_ends_offer() -> None:
    workers = [
        WorkerView("a", 16 * GIB, transports=("ucx", "zmq")),
        WorkerView("b", 16 * GIB, transports=("shm", "zmq")),
    ]
    made = plan(workers, model(), order(stages=2))
    assert [stage.transports for stage in made.stages] == [("zmq",), ("zmq",)] and made.transport == ""
    fabric = [*workers, WorkerView("c", 16 * GIB, transports=("ucx", "zmq"))]
    made = plan(fabric, model(), order(workers=("a", "c", "b")))
    assert [stage.transports for stage in made.stages] == [("ucx", "zmq"), ("zmq",), ("zmq",)]
    assert plan(workers, model(), order(stages=1)).stages[0].transports == ()
    assert plan(workers, model(), order(transport="ucx")).excluded == (
        ("b", "offers no transport 'ucx', only shm, zmq"),
    )
    with pytest.raises(NotReady, match="no tensor transport in common"):
        plan([workers[0], WorkerView("c", 16 * GIB, transports=("shm",))], model(), order(stages=2))


def test_names_sort_as_people_count() -> None:
    assert sorted(["w10", "w2", "w", "1b", "w2-x"], key=natural) == ["1b", "w", "w2", "w2-x", "w10"]


def test_sizes_are_rounded_for_people_and_exact_beside() -> None:
    assert readable(0) == "0 bytes"
    assert readable(1536) == "1.5 KiB (1536 bytes)"
    assert readable(5 * GIB) == f"5.0 GiB ({5 * GIB} bytes)"


@pytest.mark.parametrize("stages", [0, 3, 80])
def test_a_plan_over_a_thousand_workers_takes_under_fifty_milliseconds(stages: int) -> None:
    large = model(126, layer_bytes=3 * GIB // 2)
    workers = [WorkerView(f"worker-{number}", (4 + number % 13) * GIB) for number in range(1000)]
    if stages == 3:
        workers = [WorkerView(worker.name, worker.memory_bytes * 20) for worker in workers]
    times = []
    for _ in range(3):
        began = time.process_time()
        made = plan(workers, large, order(stages=stages))
        times.append(time.process_time() - began)
    assert sum(layers_of(made)) == 126
    assert min(times) < 0.05


sizes = st.integers(0, 40 * MIB)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[WorkerView], ModelShape, Order]:
    layer_bytes = tuple(draw(st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=24)))
    head, tail = draw(sizes), draw(sizes)
    shared = min(head, tail) if draw(st.booleans()) else 0
    every, cell = draw(st.integers(0, MIB)), draw(st.integers(1, 512))
    shape = ModelShape("m", ModelCosts(layer_bytes, head, tail, shared, every, cell, 4096, 8192), 256)
    memory = draw(st.lists(st.integers(0, 400 * MIB), min_size=1, max_size=8))
    workers = [WorkerView(f"w{number}", size, draw(st.integers(0, 20 * MIB))) for number, size in enumerate(memory)]
    options = Options(context=draw(st.integers(1, 600)), slots=draw(st.integers(1, 4)), chunk=draw(st.integers(1, 64)))
    kind = draw(st.sampled_from(["fewest", "stages", "layers", "workers"]))
    stages = draw(st.integers(1, len(layer_bytes))) if kind != "fewest" else 0
    layers: tuple[int, ...] = ()
    if kind == "layers":
        places = st.integers(1, len(layer_bytes) - 1) if len(layer_bytes) > 1 else st.nothing()
        cuts = draw(st.sets(places, min_size=stages - 1, max_size=stages - 1))
        bounds = [0, *sorted(cuts), len(layer_bytes)]
        layers = tuple(after - before for before, after in pairwise(bounds))
    names: tuple[str, ...] = ()
    if kind == "workers":
        picked = draw(st.permutations([worker.name for worker in workers]))
        names = tuple(picked[: draw(st.integers(1, min(len(picked), len(layer_bytes))))])
        stages = draw(st.sampled_from([0, stages]))
    return workers, shape, Order(options, stages, names, layers)


@settings(max_examples=300, deadline=None)
@given(situations())
def test_any_plan_covers_the_model_in_order_and_keeps_every_worker_in_its_budget(
    situation: tuple[list[WorkerView], ModelShape, Order],
) -> None:
    workers, shape, wanted = situation
    try:
        made = plan(workers, shape, wanted)
    except NotEnoughMemory as error:
        assert "bytes) are missing" in str(error) or "bytes are missing" in str(error)
        return
    edges = [0, *(stage.end for stage in made.stages)]
    assert [stage.start for stage in made.stages] == edges[:-1]
    assert edges[-1] == shape.layers
    assert all(stage.start < stage.end for stage in made.stages)
    assert [stage.index for stage in made.stages] == list(range(len(made.stages)))
    for worker in workers:
        held = sum(stage.limit_bytes for stage in made.stages if stage.worker == worker.name)
        assert held <= worker.available_bytes
    chosen, left_out = {stage.worker for stage in made.stages}, {name for name, _ in made.excluded}
    assert chosen | left_out == {worker.name for worker in workers} and not chosen & left_out
    runs = [
        name
        for position, name in enumerate(workers_of(made))
        if position == 0 or workers_of(made)[position - 1] != name
    ]
    assert len(runs) == len(set(runs))
    if wanted.stage_count:
        assert len(made.stages) == wanted.stage_count
    if wanted.layers:
        assert tuple(layers_of(made)) == wanted.layers
    if wanted.workers:
        assert [name for name in wanted.workers if name in runs] == runs


@settings(max_examples=100, deadline=None)
@given(situations(), st.integers(2, 4))
def test_more_memory_never_makes_a_plan_fail(
    situation: tuple[list[WorkerView], ModelShape, Order], factor: int
) -> None:
    workers, shape, wanted = situation
    try:
        plan(workers, shape, wanted)
    except EldricError:
        return
    larger = [WorkerView(worker.name, worker.memory_bytes * factor, worker.used_bytes) for worker in workers]
    plan(larger, shape, wanted)


def test_layers_are_shared_by_how_fast_workers_are() -> None:
    fast, slow = cluster(64, 64)
    made = plan([fast, replace(slow, pace=3)], model(tail_bytes=0), order(stages=2))
    assert layers_of(made) == [24, 8]
    small = replace(fast, memory_bytes=4 * GIB)
    made = plan([small, replace(slow, pace=3)], model(tail_bytes=0), order(stages=2))
    taken = dict(zip(workers_of(made), layers_of(made), strict=True))
    assert taken == {"worker-1": 15, "worker-2": 17}  # as many as the fast one has room for


@settings(max_examples=100, deadline=None)
@given(situations(), st.just([1, 1, 1]) | st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_with_room_for_everything_no_cut_is_quicker(
    situation: tuple[list[WorkerView], ModelShape, Order], paces: list[int]
) -> None:
    """Against all cuts of a small model over the same ring: the slowest stage is as quick as it can be; where workers
    are not equally fast, as near to it as one layer."""
    _, shape, wanted = situation
    shape = ModelShape("m", replace(shape.costs, layer_bytes=shape.costs.layer_bytes[:8]), 256)
    stages = min(3, shape.layers)
    workers = [WorkerView(f"w{number}", 1000 * GIB, pace=pace) for number, pace in enumerate(paces)]
    made = plan(workers, shape, Order(wanted.options, stages))
    ring = [paces[int(name[1:])] for name in workers_of(made)]
    read = shape.memory(0, 1, wanted.options).kv // wanted.options.slots // 2

    def time_of(index: int, start: int, end: int) -> int:
        tail = shape.costs.tail_bytes if end == shape.layers else 0
        return (sum(shape.costs.layer_bytes[start:end]) + read * (end - start) + tail) * ring[index]

    def quickest(start: int, left: int) -> int:
        index = stages - left
        if left == 1:
            return time_of(index, start, shape.layers)
        return min(
            max(time_of(index, start, end), quickest(end, left - 1))
            for end in range(start + 1, shape.layers - left + 2)
        )

    slowest = max(time_of(stage.index, stage.start, stage.end) for stage in made.stages)
    a_layer = (max(shape.costs.layer_bytes) + read) * max(ring) if len(set(ring)) > 1 else 0
    assert slowest <= quickest(0, stages) + a_layer
