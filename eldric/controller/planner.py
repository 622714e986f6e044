"""Where the layers of a model go: a pure function from the cluster, the model and the order to a plan."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from eldric.controller.costs import ModelShape, Options, readable
from eldric.controller.links import LinkChoice, ring_choices
from eldric.controller.partition import Cut, Partition, Ring, Shortfall
from eldric.controller.seating import (
    HEAD_ROOM,
    Seating,
    WorkerView,
    as_named,
    by_need,
    natural,
    one_each,
    roomiest,
    shared,
)
from eldric.errors import EldricError, InvalidRequest, NotEnoughMemory, NotReady, VersionMismatch
from eldric.nearest import known_names


@dataclass(frozen=True, slots=True)
class Order:
    """What somebody asked for. Fields as in the message DeployRequest."""

    options: Options
    stages: int = 0  # 0: the fewest that fit, or one on each named worker
    workers: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    transport: str = ""

    @property
    def stage_count(self) -> int:
        """How many stages were asked for; 0 when that is left to the planner."""
        return self.stages or len(self.layers) or len(self.workers)


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of a plan: layers [start, end) on a worker, and its memory in bytes."""

    index: int
    worker: str
    start: int
    end: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    available_bytes: int  # what the worker has for it, earlier stages of this plan and head room taken off
    limit_bytes: int  # what it may take: `needed_bytes`, and a second copy of the weights where there is room for it
    transports: tuple[str, ...] = ()  # that the link to the next stage may go by, best first

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    stages: tuple[PlannedStage, ...]
    excluded: tuple[tuple[str, str], ...]  # worker and reason
    options: Options
    transport: str  # that every link must take; empty: each the best that it can

    @property
    def layout(self) -> tuple[tuple[str, int, int], ...]:
        """What makes two plans the same: worker and layers of each stage."""
        return tuple((stage.worker, stage.start, stage.end) for stage in self.stages)


def plan(cluster: Iterable[WorkerView], shape: ModelShape, order: Order, protocol: int = 1) -> Plan:
    """Choose workers and layer ranges: the fewest workers that fit, or exactly as many stages as were ordered.

    Stages are on distinct workers while there are enough that fit; otherwise neighbours share a worker.
    Raises InvalidRequest for an order that no cluster could serve, NotReady without a usable worker,
    VersionMismatch when a named worker (or every one) speaks another protocol, NotEnoughMemory with the bytes that
    are missing and where.
    """
    _check(order, shape)
    workers, excluded = _usable(tuple(cluster), order, protocol)
    partition = Partition(shape, order.options)
    bounds = tuple(accumulate(order.layers, initial=0)) if order.layers else None
    found = _solve(workers, partition, shape, order, bounds)
    if found is None:
        raise _too_little(workers, partition, shape, order, bounds)
    seating, cut = found
    links = ring_choices(seating.workers, order.transport)
    stages = _linked(_stages(seating, cut, shape, order.options), links)
    chosen = {stage.worker for stage in stages}
    spare = tuple((worker.name, "not needed") for worker in workers if worker.name not in chosen)
    options = replace(order.options, lanes=order.options.lanes or len(stages))
    return Plan(stages, excluded + spare, options, order.transport)


def _check(order: Order, shape: ModelShape) -> None:
    layers = shape.layers
    if order.layers:
        if order.stages not in (0, len(order.layers)):
            raise InvalidRequest(f"{len(order.layers)} layer counts are given for {order.stages} stages")
        if min(order.layers) < 1:
            raise InvalidRequest("every stage needs at least one layer")
        if sum(order.layers) != layers:
            raise InvalidRequest(f"the layer counts add up to {sum(order.layers)}; {shape.name} has {layers} layers")
    if order.stage_count > layers:
        raise InvalidRequest(f"{shape.name} has {layers} layers: it cannot be cut into {order.stage_count} stages")
    runs = [name for name, _ in groupby(order.workers)]
    if len(runs) != len(set(runs)):
        raise InvalidRequest("a worker that is named more than once must be named side by side")


def _usable(
    cluster: Sequence[WorkerView], order: Order, protocol: int
) -> tuple[list[WorkerView], tuple[tuple[str, str], ...]]:
    """The workers that may be used, and the others with the reason. Raises when a named one, or every one, may not."""
    names = {worker.name for worker in cluster}
    for name in order.workers:
        if name not in names:
            raise NotReady(f"there is no worker {name!r}; {known_names(name, sorted(names, key=natural))}")
    usable: list[WorkerView] = []
    excluded: list[tuple[str, str]] = []
    refusals: list[EldricError] = []
    for worker in sorted(cluster, key=lambda worker: natural(worker.name)):
        if order.workers and worker.name not in order.workers:
            excluded.append((worker.name, "not among the named workers"))
            continue
        refusal = _refusal(worker, order, protocol)
        if refusal is None:
            usable.append(worker)
            continue
        excluded.append((worker.name, str(refusal)))
        refusals.append(refusal)
    if order.workers and refusals:
        raise type(refusals[0])(f"{excluded[0][0]} cannot be used: {refusals[0]}")
    if not usable:
        if not cluster:
            raise NotReady("there is no worker: start one with `eldric-cli worker`, or some with `eldric-cli up`")
        raise type(refusals[0])("no worker can be used: " + "; ".join(f"{name}: {why}" for name, why in excluded))
    return usable, tuple(excluded)


def _refusal(worker: WorkerView, order: Order, protocol: int) -> EldricError | None:
    if worker.unusable:
        return NotReady(worker.unusable)
    if worker.protocol != protocol:
        return VersionMismatch(f"speaks protocol version {worker.protocol}, this cluster speaks {protocol}")
    if order.transport and order.transport not in worker.transports:
        return NotReady(f"offers no transport {order.transport!r}, only {', '.join(worker.transports)}")
    return None


def _solve(
    workers: Sequence[WorkerView],
    partition: Partition,
    shape: ModelShape,
    order: Order,
    bounds: tuple[int, ...] | None,
) -> tuple[Seating, Cut] | None:
    """The first alternative with room, and of equal ones the one whose slowest stage is quickest."""
    cut: Callable[[Ring], Cut | None] = partition.cut if bounds is None else lambda ring: partition.given(ring, bounds)
    for seatings in _alternatives(workers, partition, shape, order, bounds):
        cuts = [(seating, found) for seating in seatings if (found := cut(seating.ring)) is not None]
        if cuts:
            return min(cuts, key=lambda pair: pair[1].slowest)
    return None


def _alternatives(
    workers: Sequence[WorkerView],
    partition: Partition,
    shape: ModelShape,
    order: Order,
    bounds: tuple[int, ...] | None,
) -> Iterator[list[Seating]]:
    """Seatings to try, in groups: a later group counts only when no seating of an earlier one has room."""
    stages = order.stage_count
    if order.workers:
        yield as_named(workers, order.workers, stages)
    elif stages:
        seatings = shared(workers, stages)
        yield next(seatings)
        if bounds is not None:
            needs = [partition.needed(stage, stages, bounds[stage], bounds[stage + 1]) for stage in range(stages)]
            yield by_need(workers, needs)
        yield from seatings
    else:
        rooms = list(accumulate(worker.available_bytes for worker in roomiest(workers)))
        for count in range(1, min(len(workers), shape.layers) + 1):
            if rooms[count - 1] >= partition.total(count):
                yield one_each(workers, count)


def _stages(seating: Seating, cut: Cut, shape: ModelShape, options: Options) -> tuple[PlannedStage, ...]:
    rooms = {worker.name: worker.available_bytes for worker in seating.workers}
    stages = []
    for index, (worker, start, end) in enumerate(zip(seating.workers, cut.bounds, cut.bounds[1:], strict=False)):
        memory = shape.memory(start, end, options)
        sizes = memory.weights, memory.kv, memory.compute
        stages.append(PlannedStage(index, worker.name, start, end, *sizes, rooms[worker.name], memory.total))
        rooms[worker.name] -= memory.total
    if options.weights == "mapped":
        return tuple(stages)
    for index, stage in enumerate(stages):
        copy = min(stage.weights_bytes, rooms[stage.worker])
        rooms[stage.worker] -= copy
        stages[index] = replace(stage, limit_bytes=stage.needed_bytes + copy)
    return tuple(stages)


def _linked(stages: tuple[PlannedStage, ...], links: tuple[LinkChoice, ...]) -> tuple[PlannedStage, ...]:
    """The stages with what their links may go by; a single stage has no link."""
    if not links:
        return stages
    return tuple(
        replace(stage, transports=(link.scheme, *link.others)) for stage, link in zip(stages, links, strict=True)
    )


def _too_little(
    workers: Sequence[WorkerView],
    partition: Partition,
    shape: ModelShape,
    order: Order,
    bounds: tuple[int, ...] | None,
) -> NotEnoughMemory:
    """What is missing where, in the ring that lacks least."""
    stages = order.stage_count or min(len(workers), shape.layers)
    seatings = as_named(workers, order.workers, stages) if order.workers else next(shared(workers, stages))
    needed, lacking = partition.total(stages), []
    for seating in seatings:
        ring = seating.ring
        short = partition.shortfall(ring) if bounds is None else partition.misfit(ring, bounds)
        if short is not None:
            lacking.append((max(needed - sum(ring.rooms), short.needed - short.room), seating, short))
    missing, seating, short = min(lacking, key=lambda lack: lack[0])
    room, name, content = sum(seating.ring.rooms), seating.workers[short.seat].name, _content(short, shape)
    return NotEnoughMemory(
        f"{shape.name} does not fit, {readable(missing)} are missing: "
        f"{_count(stages, 'stage')} need {readable(needed)} and {_count(len(seating.ring.rooms), 'worker')} "
        f"have {readable(room)}, with {HEAD_ROOM:.0%} head room kept; "
        f"{name} has {readable(short.room)} for {content}, which need {readable(short.needed)}. "
        "Add workers or memory, or take a smaller context, fewer slots or a smaller quantization"
    )


def _content(short: Shortfall, shape: ModelShape) -> str:
    """What a stage holds, in words: "layers 20 to 29 with the output matrix"."""
    layers = f"layer {short.start}" if short.end - short.start == 1 else f"layers {short.start} to {short.end - 1}"
    extras = ["the token embedding"] if short.start == 0 else []
    extras += ["the output matrix"] if short.end == shape.layers else []
    return f"{layers} with {' and '.join([*extras, 'KV cache', 'compute buffers'])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
