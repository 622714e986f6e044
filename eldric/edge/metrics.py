"""What an edge counts, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from eldric.v1 import tunnel_pb2


class EdgeMetrics:
    """Counters of events. What there is now, TunnelCollector tells."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.refused = Counter(
            "eldric_edge_refused",
            "What was refused: tunnels (full, another node's session, broken rules), channels, ports, joiners.",
            ["what"],
            registry=registry,
        )
        self.streams = Counter(
            "eldric_edge_streams", "Tunnels that came: new ones, and such that came back.", ["how"], registry=registry
        )
        self.over = Counter(
            "eldric_edge_sessions_over", "Sessions that ended, by reason.", ["reason"], registry=registry
        )


class Totals:
    """Of sessions that are over, so that counters never go back."""

    def __init__(self) -> None:
        self.sent_bytes = self.received_bytes = self.channels = 0

    def add(self, status: tunnel_pb2.TunnelStatus) -> None:
        self.sent_bytes += status.sent_bytes
        self.received_bytes += status.received_bytes
        self.channels += status.channels_total


def tunnel_metrics(statuses: list[tunnel_pb2.TunnelStatus], over: Totals) -> Iterator[Metric]:
    """The tunnels of now, as a collector gives them."""
    tunnels = GaugeMetricFamily("eldric_edge_tunnels", "Tunnels, connected or broken and waited for.", labels=["state"])
    connected = sum(status.connected for status in statuses)
    tunnels.add_metric(["connected"], connected)
    tunnels.add_metric(["waiting"], len(statuses) - connected)
    yield tunnels
    yield GaugeMetricFamily("eldric_edge_channels", "Channels open.", sum(status.channels for status in statuses))
    kept = sum(status.kept_bytes for status in statuses)
    yield GaugeMetricFamily("eldric_edge_kept_bytes", "Bytes that wait for a node's acknowledgement.", kept)
    opened = over.channels + sum(status.channels_total for status in statuses)
    yield CounterMetricFamily("eldric_edge_channels_opened", "Channels opened.", opened)
    carried = CounterMetricFamily("eldric_edge_bytes", "Bytes of channels carried.", labels=["direction"])
    carried.add_metric(["to_node"], over.sent_bytes + sum(status.sent_bytes for status in statuses))
    carried.add_metric(["from_node"], over.received_bytes + sum(status.received_bytes for status in statuses))
    yield carried
