"""What the client advises when nobody serves what is asked for: there is such a command."""

import re

import pytest

from eldric.cli.commands import COMMANDS
from eldric.client.connections import none_up
from eldric.v1 import registry_pb2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (registry_pb2.DATA, "the cluster has no data worker that is up: `eldric-cli data` runs one"),
        (registry_pb2.ROUTER, "the cluster has no router that is up: `eldric-cli router` runs one"),
    ],
)
def test_a_missing_node_is_named_with_the_command_that_runs_it(
    kind: "registry_pb2.NodeKind.ValueType", words: str
) -> None:
    message = none_up(kind).message
    assert message.startswith(words)
    assert set(re.findall(r"`eldric-cli (\w+)`", message)) <= COMMANDS.keys()
