"""What a worker counts of its fetches."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class FetchMetrics:
    """Bytes and failures by data worker. Reasons: unreachable, busy, refused, wrong_answer, corrupt."""

    def __init__(self, registry: CollectorRegistry, cache_bytes: Callable[[], int]) -> None:
        self.bytes = Counter(
            "eldric_fetched_bytes", "Bytes of models that were fetched and kept.", ["source"], registry=registry
        )
        self.failures = Counter(
            "eldric_fetch_failures", "Fetches that failed, by reason.", ["source", "reason"], registry=registry
        )
        held = Gauge("eldric_cache_bytes", "Bytes of models in the cache of this machine.", registry=registry)
        held.set_function(cache_bytes)
