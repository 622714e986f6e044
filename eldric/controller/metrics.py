"""What a controller counts, for Prometheus."""

from collections import Counter as Tally
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eldric.controller.cluster import Cluster
from eldric.controller.deployments import PipelineState
from eldric.controller.nodes import NodeState
from eldric.controller.replication import Status

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class ControllerMetrics:
    """Counters of what happened; ClusterCollector shows what is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.beats = Counter("eldric_beats", "Beats of nodes", ["kind"], registry=registry)
        self.probes = Counter("eldric_probes", "Probes of suspect nodes", ["result"], registry=registry)
        self.deploys = Histogram(
            "eldric_deploy_seconds",
            "From a deploy or rebalance request to its end",
            ["operation", "result"],
            buckets=_SECONDS,
            registry=registry,
        )


class ClusterCollector(Collector):
    """Counts nodes and pipelines when somebody scrapes. States without any are there with 0, so that alarms work."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        nodes = GaugeMetricFamily("eldric_nodes", "Nodes known", labels=["kind", "state"])
        found = Tally((node.info.kind, node.state) for node in self._cluster.nodes())
        for kind in sorted({"worker", "data", "router", *(kind for kind, _ in found)}):
            for state in NodeState:
                nodes.add_metric([kind, state.value], found[kind, state])
        pipelines = GaugeMetricFamily("eldric_pipelines", "Pipelines", labels=["state"])
        states = Tally(deployment.state for deployment in self._cluster.deployments)
        for pipeline_state in PipelineState:
            pipelines.add_metric([pipeline_state.value], states[pipeline_state])
        memory = GaugeMetricFamily("eldric_worker_memory_bytes", "Memory of workers", labels=["worker", "kind"])
        for view in self._cluster.worker_views():
            memory.add_metric([view.name, "offered"], view.memory_bytes)
            memory.add_metric([view.name, "committed"], view.used_bytes)
        return iter((nodes, pipelines, memory))


class ReplicationCollector(Collector):
    """How many data workers hold the models whose number of copies was set."""

    def __init__(self, statuses: Callable[[], list[Status]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        copies = GaugeMetricFamily("eldric_model_copies", "Copies of a model in stores", labels=["model", "kind"])
        for status in self._statuses():
            copies.add_metric([status.goal.model, "wanted"], status.goal.copies)
            copies.add_metric([status.goal.model, "held"], len(status.holders))
        return iter((copies,))
