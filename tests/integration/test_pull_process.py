"""Pulls by a data worker that is killed, ended and called over gRPC and REST."""

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eldric.channels import call_errors, channel
from eldric.data.store import ModelStore
from eldric.errors import EldricError, InvalidRequest
from eldric.security import Authority
from eldric.v1 import model_store_pb2 as pb
from tests.hubs import FakeHub, serving_hub
from tests.integration.test_data_process import data_process
from tests.models import storyteller
from tests.pulling import REPOSITORY, SIZE, URI, kept_bytes
from tests.stores import ignore, store_calls

STALL = 2 << 20


@pytest.fixture
def authority() -> Authority:
    return Authority.create("test")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving_hub() as made:
        made.add(REPOSITORY, {"Tale-Q8_0.gguf": storyteller()})
        yield made


def settings(hub: FakeHub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_mine", "NO_PROXY": "127.0.0.1,localhost"}


async def until_kept(folder: Path) -> None:
    """Until so much has come that the hub says no more."""
    store = ModelStore(folder / "models")
    async with asyncio.timeout(20):
        while kept_bytes(store) < STALL:
            await asyncio.sleep(0.02)


async def test_a_pull_goes_on_after_the_data_worker_was_killed(
    tmp_path: Path, authority: Authority, hub: FakeHub
) -> None:
    hub.stall_at = STALL
    operator = authority.issue_identity("client", "tester")
    async with (
        data_process(tmp_path, authority, **settings(hub)) as (process, address),
        channel(address, operator, "data") as connection,
    ):
        events = aiter(store_calls(connection).Import(pb.ImportRequest(source=f"hf://{REPOSITORY}")))
        seen = [await anext(events), await anext(events)]
        (resolved,) = (event.resolved for event in seen if event.HasField("resolved"))
        assert (resolved.source, resolved.id, resolved.quantization) == (URI, "Tale-Q8_0", "Q8_0")
        assert [(file.name, file.size_bytes) for file in resolved.files] == [("Tale-Q8_0.gguf", SIZE)]
        await until_kept(tmp_path)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    hub.stall_at = -1
    hub.go_on.set()
    async with data_process(tmp_path, authority, **settings(hub)) as (_, address):
        url = json.loads((tmp_path / "node" / "node.json").read_text())["http_url"]
        async with httpx.AsyncClient(base_url=url, verify=operator.client_context(), timeout=20) as http:
            answer = await http.post(
                "/api/v1/models/import", json={"source": URI}, headers={"accept": "application/json"}
            )
        events_of = answer.json()
        assert [event["resolved"]["kept_bytes"] for event in events_of if "resolved" in event] == [STALL]
        assert events_of[-1]["model"]["id"] == "Tale-Q8_0"
    assert hub.downloads[-1].range == f"bytes={STALL}-"
    assert {request.token for request in hub.seen if request.path.startswith("/api/")} == {"Bearer hf_mine"}
    ModelStore(tmp_path / "models").verify("Tale-Q8_0", ignore)


async def test_a_data_worker_that_ends_does_not_wait_for_a_hub_that_stalls(
    tmp_path: Path, authority: Authority, hub: FakeHub
) -> None:
    hub.stall_at = STALL
    operator = authority.issue_identity("client", "tester")
    async with (
        data_process(tmp_path, authority, **settings(hub)) as (process, address),
        channel(address, operator, "data") as connection,
    ):
        call = store_calls(connection).Import(pb.ImportRequest(source=URI))
        await anext(aiter(call))
        await until_kept(tmp_path)
        process.terminate()
        with pytest.raises(EldricError), call_errors():
            async for _ in call:
                pass
        async with asyncio.timeout(8):
            assert await process.wait() == 0
    store = ModelStore(tmp_path / "models")
    assert store.list() == [] and kept_bytes(store) == STALL


async def test_an_import_names_a_path_or_a_source(tmp_path: Path, authority: Authority, hub: FakeHub) -> None:
    operator = authority.issue_identity("client", "tester")
    async with (
        data_process(tmp_path, authority, **settings(hub)) as (_, address),
        channel(address, operator, "data") as connection,
    ):
        for request in (pb.ImportRequest(), pb.ImportRequest(path=str(storyteller()), source=URI)):
            with pytest.raises(InvalidRequest, match="name a path or a source"), call_errors():
                await anext(aiter(store_calls(connection).Import(request)))
