"""The last copy of a model that a pipeline needs is not removed, whoever asks and whatever is done meanwhile."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eldric.channels import call_errors, channel
from eldric.controller.main import Controller
from eldric.controller.planning import Planning, Prepared
from eldric.controller.releases import Releases
from eldric.data.main import DataWorker
from eldric.errors import EldricError, NotFound, NotReady, PermissionDenied, Unavailable
from eldric.v1 import model_store_pb2, pipeline_pb2, replication_pb2
from eldric.v1.model_store_pb2_grpc import ModelStoreStub
from eldric.v1.replication_pb2_grpc import ReplicationStub
from tests.controllers import MODEL, World, controller_here
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import serving

pytestmark = pytest.mark.timeout(30)

UNDEPLOY_FIRST = f"{MODEL} is deployed, and could not be loaded again: `eldric-cli undeploy {MODEL}` first"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[tuple[World, Controller]]:
    """Two workers."""
    async with controller_here(tmp_path) as (world, controller):
        await world.add_workers("a", "b")
        yield world, controller


@pytest.fixture
async def world(here: tuple[World, Controller]) -> World:
    return here[0]


async def remove(world: World, store: DataWorker, *, force: bool = False) -> None:
    operator = world.authority.issue_identity("client", "tester")
    async with channel(store.node.grpc_address, operator, "data") as connection:
        with call_errors():
            await ModelStoreStub(connection).Remove(model_store_pb2.RemoveModelRequest(id=MODEL, force=force))


def holds(store: DataWorker) -> bool:
    return store.store.find(MODEL) is not None


async def test_a_deployed_model_stays_and_goes_after_the_pipeline(world: World) -> None:
    store = await world.add_store()
    await world.calls.deploy(stages=2)
    tls = world.authority.issue_identity("client", "tester").client_context()
    async with httpx.AsyncClient(verify=tls, base_url=store.node.http_url, trust_env=False) as http:
        refused = await http.delete(f"/api/v1/models/{MODEL}")
        assert (refused.status_code, refused.json()["error"]["message"]) == (412, UNDEPLOY_FIRST)
        await world.calls.undeploy()
        assert (await http.delete(f"/api/v1/models/{MODEL}")).status_code == 200
    assert not holds(store)


async def test_of_two_copies_one_may_go_and_the_last_stays(world: World) -> None:
    first, second = await world.add_store("one"), await world.add_store("two")
    await world.calls.deploy()
    await remove(world, first)
    with pytest.raises(NotReady, match="could not be loaded again"):
        await remove(world, second)
    assert (holds(first), holds(second)) == (False, True)


async def test_another_model_of_that_name_elsewhere_is_no_copy(world: World, tmp_path: Path) -> None:
    first = await world.add_store("one")
    await world.calls.deploy()
    await world.add_store("two", write_small_llama(tmp_path / "other.gguf", SmallLlama()))
    with pytest.raises(NotReady, match="could not be loaded again"):
        await remove(world, first)


async def test_both_copies_removed_at_once_leave_one(world: World) -> None:
    stores = [await world.add_store("one"), await world.add_store("two")]
    await world.calls.deploy()
    done = await asyncio.gather(*(remove(world, store) for store in stores), return_exceptions=True)
    assert any(isinstance(each, NotReady) for each in done)
    assert any(map(holds, stores))


async def test_all_copies_are_not_to_go_and_none_does(world: World) -> None:
    stores = [await world.add_store("one"), await world.add_store("two")]
    await world.calls.deploy()
    with pytest.raises(NotReady, match="could not be loaded again"), call_errors():
        await ReplicationStub(world.calls.connection).Release(replication_pb2.ReleaseRequest(model=MODEL))
    assert all(map(holds, stores))


async def reached(event: asyncio.Event, call: "asyncio.Task[Any]") -> None:
    """Wait for what a call comes to; raises what ends the call before."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({waiting, call}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not event.is_set():
        await call


async def test_a_model_whose_deployment_has_just_begun_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await world.add_store()
    looked_up, go_on = asyncio.Event(), asyncio.Event()
    prepare = Planning.prepare

    async def slowly(self: Planning, request: pipeline_pb2.DeployRequest) -> Prepared:
        prepared = await prepare(self, request)
        looked_up.set()
        await go_on.wait()
        return prepared

    monkeypatch.setattr(Planning, "prepare", slowly)
    deploying = asyncio.create_task(world.calls.deploy())
    await reached(looked_up, deploying)
    with pytest.raises(NotReady, match="is being deployed"):
        await remove(world, store)
    go_on.set()
    await deploying
    assert holds(store)


async def test_no_deployment_begins_while_a_model_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await world.add_store()
    asked, answer = asyncio.Event(), asyncio.Event()
    check = Releases.check

    async def slowly(self: Releases, model: str, node_id: str) -> None:
        await check(self, model, node_id)
        asked.set()
        await answer.wait()

    monkeypatch.setattr(Releases, "check", slowly)
    removing = asyncio.create_task(remove(world, store))
    await reached(asked, removing)
    with pytest.raises(NotReady, match="is being removed"):
        await world.calls.deploy()
    answer.set()
    await removing
    with pytest.raises(NotFound):
        await world.calls.deploy()


async def test_force_removes_a_deployed_model_and_the_log_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    store = await world.add_store()
    await world.calls.deploy()
    with caplog.at_level(logging.WARNING, "eldric.data.service"):
        await remove(world, store, force=True)
    assert f"event=removing_by_force id={MODEL}" in caplog.text
    assert not holds(store)


async def test_without_a_controller_only_force_removes(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.add(storyteller(), MODEL)
        request: Any = model_store_pb2.RemoveModelRequest(id=MODEL)
        with pytest.raises(Unavailable, match="nobody says whether a pipeline needs tale"), call_errors():
            await served.calls.Remove(request)
        request.force = True
        await served.calls.Remove(request)
        assert not holds(served.worker)


async def test_a_data_worker_asks_for_its_own_copy_only(world: World) -> None:
    identity = world.authority.issue_identity("data", "one")
    async with channel(world.address, identity, "controller") as connection:
        stub, request = ReplicationStub(connection), replication_pb2.ReleaseRequest(model=MODEL, node_id="data/two")
        with pytest.raises(PermissionDenied), call_errors():
            await stub.Release(request)
        request.node_id = "data/one"
        await stub.Release(request)


async def test_a_failed_deployment_holds_no_model(world: World) -> None:
    store = await world.add_store()
    with pytest.raises(EldricError):
        await world.calls.deploy(stages=9)
    await remove(world, store)
    assert not holds(store)
