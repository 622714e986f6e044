"""What waits for a model has a deadline when it is given one, and none by itself."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eldric import channels
from eldric.client import AsyncClient, Cluster
from eldric.errors import DeadlineExceeded
from eldric.v1 import inference_pb2
from tests.fake_cluster import FakeCluster, fake_cluster

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[tuple[AsyncClient, FakeCluster]]:
    async with fake_cluster(tmp_path) as made:
        made.authority.issue_identity("client", "tester").save(tmp_path / "operator")
        cluster = Cluster((made.controller_node.grpc_address,), tmp_path / "operator")
        async with AsyncClient(cluster) as calls:
            await calls.tokenize("storyteller", "A")  # the router is found and knows the model
            yield calls, made


async def test_an_embedding_takes_as_long_as_it_must(
    client: tuple[AsyncClient, FakeCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, cluster = client
    monkeypatch.setattr(channels, "DEFAULT_TIMEOUT_S", 0.2)

    async def slowly(request: Any) -> AsyncIterator[inference_pb2.Delta]:
        await asyncio.sleep(0.6)
        yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=5)])

    cluster.head.say = slowly
    assert (await calls.embed("storyteller", "A")).vector == (1.0, 0.0)
    with pytest.raises(DeadlineExceeded):
        await calls.embed("storyteller", "A", timeout_s=0.1)
