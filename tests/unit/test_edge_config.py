"""Settings of edges, and of nodes behind them."""

from pathlib import Path

import pytest

from eldric.config import NodeConfig
from eldric.edge.config import EdgeConfig, parse_ports
from eldric.errors import InvalidRequest


def edge_node() -> NodeConfig:
    return NodeConfig("edge", "e", Path("e"), controllers=("c:9880",))


def test_an_edge_has_the_ports_of_its_kind() -> None:
    config = edge_node()
    assert (config.http_port, config.grpc_port, config.join_port) == (443, 1443, 2443)


def test_a_node_needs_a_controller_or_an_edge() -> None:
    NodeConfig("worker", "w", Path("w"), edge="edge.example.org:1443")
    with pytest.raises(InvalidRequest, match="of a controller, or of an edge"):
        NodeConfig("worker", "w", Path("w"))
    with pytest.raises(InvalidRequest, match="write host:port"):
        NodeConfig("worker", "w", Path("w"), edge="edge.example.org")


@pytest.mark.parametrize("kind", ["controller", "edge"])
def test_controllers_and_edges_are_behind_none(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="must be reached directly"):
        NodeConfig(kind, "x", Path("x"), controllers=("c:9880",), edge="e:1443")


def test_ports_are_a_range() -> None:
    assert parse_ports("20000-20099") == (20000, 20099)
    EdgeConfig(edge_node(), ports=(7, 7))


@pytest.mark.parametrize("text", ["20000", "20099-20000", "0-5", "1-70000", "a-b", "-", "1-2-3"])
def test_other_texts_are_no_ports(text: str) -> None:
    with pytest.raises(InvalidRequest):
        EdgeConfig(edge_node(), ports=parse_ports(text))
