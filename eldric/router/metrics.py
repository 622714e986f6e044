"""What a router counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eldric.metrics import LATENCY_BUCKETS


class ModelMetrics:
    """The metrics of one pipeline, its label bound once: some are counted for every token."""

    __slots__ = ("_ended", "_pipeline", "first_token", "generated_tokens", "inter_token", "prompt_tokens")

    def __init__(self, metrics: "RouterMetrics", pipeline: str) -> None:
        self.first_token = metrics.first_token.labels(pipeline)
        self.inter_token = metrics.inter_token.labels(pipeline)
        self.prompt_tokens = metrics.prompt_tokens.labels(pipeline)
        self.generated_tokens = metrics.generated_tokens.labels(pipeline)
        self._ended, self._pipeline = metrics.generations, pipeline

    def ended(self, reason: str) -> None:
        """`reason`: "stop", "length", "cancelled" (by Cancel), "gone" (the client) or "failed"."""
        self._ended.labels(self._pipeline, reason).inc()


class RouterMetrics:
    """Metrics of all pipelines and of the HTTP face."""

    def __init__(self, registry: CollectorRegistry, active: Callable[[], int]) -> None:
        """`active` tells how many generations run or wait."""
        pipeline = ["pipeline"]
        self.first_token = Histogram(
            "eldric_router_time_to_first_token_seconds",
            "From a request's arrival to its first token, tokenizing and queueing included.",
            pipeline,
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        self.inter_token = Histogram(
            "eldric_router_inter_token_seconds",
            "Between two tokens of one generation; tokens that came together share their time.",
            pipeline,
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        self.prompt_tokens = Counter(
            "eldric_router_prompt_tokens", "Prompt tokens sent to heads.", pipeline, registry=registry
        )
        self.generated_tokens = Counter(
            "eldric_router_generated_tokens", "Tokens that came from heads.", pipeline, registry=registry
        )
        self.generations = Counter(
            "eldric_router_generations", "Generations that ended.", ["pipeline", "reason"], registry=registry
        )
        self.requests = Counter(
            "eldric_router_requests", "HTTP requests answered.", ["endpoint", "code"], registry=registry
        )
        self.seconds = Histogram(
            "eldric_router_request_seconds",
            "Time from an HTTP request's arrival to the end of its answer.",
            ["endpoint"],
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        Gauge("eldric_router_active_generations", "Generations that run or wait.", registry=registry).set_function(
            active
        )
        self._pipelines: dict[str, ModelMetrics] = {}

    def of_pipeline(self, name: str) -> ModelMetrics:
        if name not in self._pipelines:
            self._pipelines[name] = ModelMetrics(self, name)
        return self._pipelines[name]
