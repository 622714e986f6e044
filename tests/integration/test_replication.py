"""The number of a model's copies is kept up: data workers as processes, one of which is killed for good."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from eldric.channels import call_errors
from eldric.controller.main import Controller
from eldric.errors import AlreadyExists, InvalidRequest, NotEnoughSpace, NotFound
from eldric.v1 import model_store_pb2, registry_pb2, replication_pb2
from eldric.v1.model_store_pb2_grpc import ModelStoreStub
from eldric.v1.replication_pb2_grpc import ReplicationStub
from tests.controllers import World, controller_here
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.replicas import Replica, filled_store, replica

if TYPE_CHECKING:
    from eldric.v1.replication_pb2_grpc import ReplicationAsyncStub

pytestmark = pytest.mark.timeout(60)

MODEL = "tale"
#: Short, and longer than a data worker takes to start again.
SETTINGS = {"survey_s": 0.1, "replicate_after_s": 1.5}
LONG_S = 60.0  # a grace time that a restart is within, however slow


class Copies:
    """An operator's calls about copies, and the cluster around them."""

    def __init__(self, world: World, controller: Controller) -> None:
        self.world, self.controller = world, controller
        stub: Any = ReplicationStub(world.calls.connection)
        self.calls: ReplicationAsyncStub = stub

    async def set(self, copies: int, model: str = MODEL) -> replication_pb2.ModelReplication:
        with call_errors():
            return await self.calls.Set(replication_pb2.SetReplicationRequest(model=model, copies=copies))

    async def list(self) -> list[replication_pb2.ModelReplication]:
        return list((await self.calls.List(replication_pb2.ListReplicationRequest())).models)

    async def until(self, condition: Callable[[replication_pb2.ModelReplication], object]) -> Any:
        async with asyncio.timeout(20):
            while True:
                (status,) = await self.list()
                if condition(status):
                    return status
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def store(self, name: str, path: Path | None = None) -> AsyncIterator[Replica]:
        """A data worker in a process of its own; path: of the file that it has as MODEL."""
        folder = self.world.folder / name
        if path is not None:
            filled_store(folder, path, MODEL)
        async with replica(folder, self.world.authority, name, self.world.address) as made:
            await self.world.calls.wait_for_node(registry_pb2.DATA, name)
            yield made

    async def holds(self, store: Replica) -> bool:
        """Whether a data worker says that its model is sound."""
        channel = self.controller.node.channels.to(store.document["grpc_address"], "data", store.name)
        with call_errors():
            answer = await ModelStoreStub(channel).List(model_store_pb2.ListModelsRequest())
        return [(info.id, info.problem) for info in answer.models] == [(MODEL, "")]


@pytest.fixture
async def copies(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Copies]:
    """A parameter is the grace time."""
    settings = SETTINGS | {"replicate_after_s": getattr(request, "param", SETTINGS["replicate_after_s"])}
    async with controller_here(tmp_path, **settings) as (world, controller):
        yield Copies(world, controller)


async def test_a_third_data_worker_gets_the_copy_of_one_that_is_killed_for_good(copies: Copies) -> None:
    async with copies.store("a", storyteller()), copies.store("b") as second:
        status = await copies.set(2)
        assert (status.copies, list(status.data_workers)) == (2, ["a"])
        assert [(copy.data_worker, copy.from_data_worker) for copy in status.copying] == [("b", "a")]
        await copies.until(lambda status: list(status.data_workers) == ["a", "b"])
        async with copies.store("c") as third:
            second.kill()
            waiting = await copies.until(lambda status: status.waits_ms)
            assert list(waiting.data_workers) == ["a"] and not waiting.copying
            assert not await copies.holds(third), "it may come back"
            await copies.until(lambda status: list(status.data_workers) == ["a", "c"])
            assert await copies.holds(third)
            source = (copies.world.folder / "a" / "models" / MODEL / f"{MODEL}.gguf").read_bytes()
            assert (third.folder / "models" / MODEL / f"{MODEL}.gguf").read_bytes() == source
            async with httpx.AsyncClient(
                verify=copies.world.authority.issue_identity("client", "x").client_context()
            ) as http:
                metrics = (await http.get(f"{copies.controller.node.http_url}/metrics")).text
            assert f'eldric_model_copies{{kind="held",model="{MODEL}"}} 2.0' in metrics

            async with replica(second.folder, copies.world.authority, "b", copies.world.address):
                status = await copies.until(lambda status: len(status.data_workers) == 3)
                assert status.copies == 2 and not status.copying and not status.problem, "a copy too many stays"


@pytest.mark.parametrize("copies", [LONG_S], indirect=True)
async def test_a_data_worker_that_restarts_costs_no_copy(copies: Copies) -> None:
    async with copies.store("a", storyteller()), copies.store("b", storyteller()) as second, copies.store("c") as third:
        assert list((await copies.set(2)).data_workers) == ["a", "b"]
        second.kill()
        await second.process.wait()
        (second.folder / "node" / "node.json").unlink()
        await copies.until(lambda status: list(status.data_workers) == ["a"])
        async with copies.store("b"):
            status = await copies.until(lambda status: list(status.data_workers) == ["a", "b"])
            assert not status.waits_ms and not status.copying
            assert not await copies.holds(third)


@pytest.mark.parametrize("remove", [True, False])
async def test_a_copy_that_is_removed_or_damaged_is_made_anew_elsewhere(copies: Copies, remove: bool) -> None:
    async with copies.store("a", storyteller()), copies.store("b", storyteller()) as second:
        await copies.set(2)
        folder = second.folder / "models" / MODEL
        if remove:
            shutil.rmtree(folder)
        else:
            (folder / "damaged").write_bytes(b"this is no model")
            (folder / "damaged").replace(folder / f"{MODEL}.gguf")  # it was a link to the file that it was made from
        async with copies.store("c") as third:
            await copies.until(lambda status: len(status.data_workers) == 2 and not status.copying)
            assert await copies.holds(second if remove else third), "by name, where both have the room"


async def test_what_cannot_be_is_said_and_nothing_is_kept(copies: Copies, tmp_path: Path) -> None:
    other = write_small_llama(tmp_path / "other.gguf", SmallLlama(layers=6))
    async with copies.store("a", storyteller()), copies.store("b"):
        with pytest.raises(InvalidRequest, match="3 copies: from 1 to 2, the number of data workers that are up"):
            await copies.set(3)
        with pytest.raises(NotFound, match="no model 'nothing'"):
            await copies.set(2, "nothing")
        with pytest.raises(InvalidRequest, match="names no model"):
            await copies.set(2, "")
        async with copies.store("c", other):
            with pytest.raises(AlreadyExists, match="'tale' is another model, or damaged, on c"):
                await copies.set(2)
        assert await copies.list() == []


async def test_without_room_the_number_stays_wanted(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    async with copies.store("a", storyteller()):
        full = await copies.world.add_empty_store("full")
        monkeypatch.setattr(full.store, "free_bytes", lambda: 1000)
        status = await copies.set(2)
        assert status.problem_error == NotEnoughSpace.__name__ and "the most has full, 1000 bytes" in status.problem
        monkeypatch.undo()
        await copies.until(lambda status: list(status.data_workers) == ["a", "full"])
        assert (await copies.set(1)).copies == 0
        assert await copies.list() == []


async def test_a_controller_that_starts_again_knows_how_many_there_should_be(tmp_path: Path) -> None:
    async with controller_here(tmp_path, **SETTINGS) as (world, controller):
        copies = Copies(world, controller)
        async with copies.store("a", storyteller()), copies.store("b", storyteller()):
            await copies.set(2)
    async with controller_here(tmp_path, **SETTINGS) as (world, controller):
        copies = Copies(world, controller)
        async with copies.store("a"), copies.store("c") as third:
            assert [status.copies for status in await copies.list()] == [2]
            await copies.until(lambda status: list(status.data_workers) == ["a", "c"])
            assert await copies.holds(third)
