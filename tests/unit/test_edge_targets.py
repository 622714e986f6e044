"""Where an edge connects a node to."""

from pathlib import Path

import pytest

from eldric.config import NodeConfig
from eldric.edge.targets import Targets
from eldric.errors import PermissionDenied
from eldric.node import Node
from eldric.security import Authority
from eldric.v1 import registry_pb2


def targets(folder: Path, host: str, *addresses: str) -> Targets:
    """Of an edge that others reach at `host`. addresses: those that workers say they have."""
    config = NodeConfig("edge", "e1", folder, host="0.0.0.0", advertise=host, controllers=("192.0.2.9:9880",))
    made = Targets(Node(config, Authority.create("demo").issue_identity("edge", "e1")))
    for number, address in enumerate(addresses):
        node_id = f"worker/w{number}"
        made._nodes[node_id] = registry_pb2.Node(id=node_id, kind=registry_pb2.WORKER, grpc_address=address)
    return made


@pytest.mark.parametrize(
    ("claimed", "asked"),
    [
        ("127.0.0.1:6379", "127.0.0.1:6379"),
        ("127.0.0.1:9882", "127.0.0.1:2375"),
        ("localhost:9882", "localhost:2375"),
        ("[::1]:9882", "[::1]:6379"),
        ("[::ffff:127.0.0.1]:9882", "[::ffff:127.0.0.1]:6379"),
        ("169.254.169.254:80", "169.254.169.254:80"),
        ("[fe80::1]:80", "[fe80::1]:80"),
        ("0.0.0.0:9882", "0.0.0.0:2375"),
        ("2130706433:9882", "2130706433:2375"),
        ("127.1:9882", "127.1:2375"),
    ],
)
async def test_an_address_that_a_node_claims_does_not_lead_into_the_edges_machine(
    tmp_path: Path, claimed: str, asked: str
) -> None:
    edge = targets(tmp_path, "203.0.113.5", claimed)
    with pytest.raises(PermissionDenied, match="only this edge's own machine"):
        await edge.resolve(asked, "worker/accomplice")


async def test_nodes_on_other_machines_are_reached(tmp_path: Path) -> None:
    edge = targets(tmp_path, "203.0.113.5", "10.0.0.7:9882", "[2001:db8::7]:9882")
    assert await edge.resolve("10.0.0.7:9882", "worker/behind") == ("10.0.0.7", 9882)
    assert await edge.resolve("10.0.0.7:40001", "worker/behind") == ("10.0.0.7", 40001)
    assert await edge.resolve("[2001:db8::7]:9882", "worker/behind") == ("2001:db8::7", 9882)
    for address in ("10.0.0.7:22", "10.0.0.8:9882"):
        with pytest.raises(PermissionDenied, match="no address of a node"):
            await edge.resolve(address, "worker/behind")


async def test_a_cluster_on_one_machine_is_reached(tmp_path: Path) -> None:
    edge = targets(tmp_path, "127.0.0.1", "127.0.0.1:9882")
    assert await edge.resolve("127.0.0.1:9882", "worker/behind") == ("127.0.0.1", 9882)
