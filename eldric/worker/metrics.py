"""What a worker counts, for Prometheus."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eldric.v1 import stage_pb2

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class PipelineMetrics:
    """The metrics of one head, labelled with its pipeline."""

    first_token: Histogram
    inter_token: Histogram
    queue: Histogram
    tokens: Counter
    refused: Counter
    live: Gauge
    _generations: Counter
    _pipeline: str

    def ended(self, reason: str) -> None:
        self._generations.labels(self._pipeline, reason).inc()


class WorkerMetrics:
    """The metrics of all heads of a worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        label = ["pipeline"]
        self._first_token = Histogram(
            "eldric_time_to_first_token_seconds",
            "From the request's arrival at the head to its first token",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "eldric_inter_token_seconds",
            "Between two tokens of one generation",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = Histogram("eldric_queue_seconds", "Wait for a slot", label, buckets=_SECONDS, registry=registry)
        self._tokens = Counter("eldric_generated_tokens", "Tokens delivered", label, registry=registry)
        self._refused = Counter("eldric_refused_requests", "Requests refused: queue full", label, registry=registry)
        self._live = Gauge("eldric_live_generations", "Generations that run or wait", label, registry=registry)
        self._generations = Counter(
            "eldric_generations", "Generations that ended", ["pipeline", "reason"], registry=registry
        )

    def of_pipeline(self, name: str) -> PipelineMetrics:
        return PipelineMetrics(
            self._first_token.labels(name),
            self._inter_token.labels(name),
            self._queue.labels(name),
            self._tokens.labels(name),
            self._refused.labels(name),
            self._live.labels(name),
            self._generations,
            name,
        )


class LinkFamilies:
    """The metrics of links, each labelled with its sending stage and its transport."""

    def __init__(self) -> None:
        labels = ["pipeline", "stage", "transport", "encryption"]
        self._round_trip = GaugeMetricFamily(
            "eldric_link_round_trip_seconds", "Way to the next stage's machine and back", labels=labels
        )
        self._frames = CounterMetricFamily("eldric_link_frames", "Frames sent to the next stage", labels=labels)
        self._bytes = CounterMetricFamily("eldric_link_bytes", "Bytes of their payloads", labels=labels)
        self._queue_frames = GaugeMetricFamily(
            "eldric_link_queue_frames", "Frames sent and not yet taken by the next stage", labels=labels
        )
        self._queue_bytes = GaugeMetricFamily("eldric_link_queue_bytes", "Bytes of their payloads", labels=labels)
        self._fallback = GaugeMetricFamily(
            "eldric_link_fallback", "1 where a better transport failed, else 0", labels=labels
        )

    @property
    def families(self) -> tuple[Metric, ...]:
        counters = self._round_trip, self._frames, self._bytes
        return (*counters, self._queue_frames, self._queue_bytes, self._fallback)

    def add(self, status: stage_pb2.StageStatus) -> None:
        if not status.HasField("link"):
            return
        link = status.link
        at = [status.name, str(status.index), link.transport, link.encryption]
        if link.round_trip_ms:  # else it is not known
            self._round_trip.add_metric(at, link.round_trip_ms / 1000)
        self._frames.add_metric(at, link.frames)
        self._bytes.add_metric(at, link.bytes)
        self._queue_frames.add_metric(at, link.queue_frames)
        self._queue_bytes.add_metric(at, link.queue_bytes)
        self._fallback.add_metric(at, bool(link.fallback))


class HasStatus(Protocol):
    def statuses(self) -> list[stage_pb2.StageStatus]: ...


class StageCollector(Collector):
    """Reads the stages' own counts when somebody scrapes, so that the hot path counts nothing twice."""

    def __init__(self, source: HasStatus) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        labels = ["pipeline", "stage"]
        step = GaugeMetricFamily("eldric_stage_step_seconds", "Median compute time of a decode step", labels=labels)
        steps = CounterMetricFamily("eldric_stage_steps", "Steps computed", labels=labels)
        slots = GaugeMetricFamily("eldric_slots_used", "Slots taken", labels=["pipeline"])
        queued = GaugeMetricFamily("eldric_queue_length", "Generations that wait for a slot", labels=["pipeline"])
        memory = GaugeMetricFamily("eldric_stage_memory_bytes", "Memory held", labels=[*labels, "kind"])
        locked = GaugeMetricFamily("eldric_stage_locked_bytes", "Mapped weights that are locked", labels=labels)
        dropped = CounterMetricFamily("eldric_dropped_frames", "Frames dropped", labels=[*labels, "reason"])
        refused = CounterMetricFamily("eldric_refused_links", "Connections refused at the tensor port", labels=labels)
        links = LinkFamilies()
        for status in self._source.statuses():
            at = [status.name, str(status.index)]
            step.add_metric(at, status.step_ms / 1000)
            steps.add_metric(at, status.steps)
            for kind in ("mapped", "repacked", "kv", "compute"):
                memory.add_metric([*at, kind], getattr(status.memory, f"{kind}_bytes"))
            locked.add_metric(at, status.memory.locked_bytes)
            for reason, count in status.dropped_frames.items():
                dropped.add_metric([*at, reason], count)
            refused.add_metric(at, status.refused_links)
            links.add(status)
            if status.index == 0:
                slots.add_metric([status.name], status.slots_used)
                queued.add_metric([status.name], status.queued)
        yield from (step, steps, slots, queued, memory, locked, dropped, refused, *links.families)
