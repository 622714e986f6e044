"""A load names every data worker that holds the planned files; none that holds others, is down or does not answer."""

import asyncio
from pathlib import Path

import pytest

from eldric.controller.models import Models
from eldric.data.export import ExportConfig, announced
from eldric.errors import Unavailable
from eldric.nfs.address import NfsAddress
from eldric.v1 import stage_pb2
from tests.controllers import World, controller_config, controller_here
from tests.models import SmallLlama, write_small_llama

pytestmark = pytest.mark.timeout(60)


def places(world: World, worker: str = "w1") -> dict[str, str]:
    """URL by node id, in the last load."""
    request = world.workers[worker].called("Load")[-1]
    assert isinstance(request, stage_pb2.LoadRequest)
    return {place.node_id: place.http_url for place in request.source.places}


async def test_a_load_names_the_data_workers_that_hold_the_very_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with controller_here(tmp_path) as (world, controller):
        await world.add_workers("w1")
        first, second = await world.add_store(), await world.add_store("second")
        await world.add_store("third", write_small_llama(tmp_path / "other.gguf", SmallLlama(layers=6)))
        await world.calls.deploy()
        urls = {"data/store": first.node.http_url, "data/second": second.node.http_url}
        assert places(world) == urls
        request = world.workers["w1"].called("Load")[-1]
        assert isinstance(request, stage_pb2.LoadRequest)
        (file,) = request.source.files
        assert file.header_bytes and len(file.sha256) == len(file.blocks_sha256) == 32
        await world.calls.undeploy()

        async def freeze(*_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(second._service, "find", freeze)
        async with asyncio.timeout(8):
            await world.calls.deploy()
        assert places(world) == {"data/store": urls["data/store"]}
        await world.calls.undeploy()
        monkeypatch.undo()

        async def fail(*_: object) -> None:
            raise Unavailable("not now")

        monkeypatch.setattr(first._service, "find", fail)
        await world.calls.deploy()
        assert places(world) == {"data/second": urls["data/second"]}
        monkeypatch.undo()
        models = Models(controller_config(tmp_path), controller.cluster, controller.node.channels)
        located = await models.located(request.source)
        assert {place.node_id for place in located.places} == set(urls)
        assert not located.exports
        with announced(ExportConfig(second.store.folder, NfsAddress("second.example", "/models"))):
            (export,) = (await models.located(request.source)).exports
        assert export.host == "second.example"
        unknown = stage_pb2.ModelSource(model="nobody has it", places=request.source.places)
        assert await models.located(unknown) == unknown
