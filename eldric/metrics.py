"""Metrics that every node has, and helpers for those of its parts."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from eldric import PROTOCOL, __version__

# One series less for each counter and histogram: nobody asks when it began.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Seconds, from a step of a small stage to a deploy: for histograms of latencies.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class CallMetrics:
    """Counts and times of the calls that a node answers, by face ("grpc", "rest") and method ("Registry/List")."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("face", "method")
        self.calls = Counter(
            "eldric_calls", "Calls answered, by gRPC status code.", (*labels, "code"), registry=registry
        )
        self.seconds = Histogram(
            "eldric_call_seconds",
            "Time from a call's arrival to its end.",
            labels,
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        self.in_flight = Gauge("eldric_calls_in_flight", "Calls being answered.", labels, registry=registry)

    @contextlib.contextmanager
    def observe(self, face: str, method: str) -> Iterator[list[str]]:
        """Times a call. The caller puts the status code's name in the list that it gets; "OK" without one."""
        codes: list[str] = []
        in_flight = self.in_flight.labels(face, method)
        in_flight.inc()
        began = time.perf_counter()
        try:
            yield codes
        finally:
            in_flight.dec()
            self.seconds.labels(face, method).observe(time.perf_counter() - began)
            self.calls.labels(face, method, codes[0] if codes else "OK").inc()


def describe_node(registry: CollectorRegistry, kind: str, name: str) -> Gauge:
    """Adds the node's name and version, its process and its interpreter. The gauge that is returned takes the Unix
    time at which the node's certificate ends."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    Info("eldric_node", "Who this node is.", registry=registry).info(
        {"kind": kind, "name": name, "version": __version__, "protocol": str(PROTOCOL)}
    )
    Gauge("eldric_tasks", "Tasks of the event loop.", registry=registry).set_function(_count_tasks)
    return Gauge("eldric_certificate_end_seconds", "When this node's certificate ends, Unix time.", registry=registry)


def _count_tasks() -> float:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read from outside the loop
        return 0.0


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The metrics in the text format that `accept` asks for, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
