"""The model store: the cluster's data workers together."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from eldric.client import convert, types
from eldric.client.connections import Connections
from eldric.client.copy_goals import CopyGoals
from eldric.client.replicas import Replicas
from eldric.errors import DataLoss, InvalidRequest, NotFound, Unavailable
from eldric.v1 import model_store_pb2, model_store_pb2_grpc

_DATA_WORKER = "the data worker"


class Models:
    """Its methods raise subclasses of EldricError; NotFound for an unknown model."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._replicas, self._goals = Replicas(connections), CopyGoals(connections)

    async def list(self) -> list[types.ModelInfo]:
        """The models of all data workers, each once."""
        return await self._replicas.models()

    async def show(self, name: str) -> types.ModelDetails:
        """What the first data worker that holds it says of it, and who holds it."""
        holders = await self._replicas.holders(name)
        wanted = await self._goals.all()
        return convert.model_details(holders[0][1], tuple(store.name for store, _ in holders), wanted[name])

    def replicate_events(
        self, name: str, to: str = "", copies: int = 2
    ) -> AsyncGenerator[types.ReplicaProgress | types.ModelReplicas, None]:
        """Have so many data workers hold a model, from now on, or have the data worker `to` copy it: progress, then who
        holds it.

        copies: what the controller keeps up; leaving early leaves that as it is. 1: no copy is made any more. See
        CopyGoals.reached_events; of `to`, Replicas.copy_events.
        """
        return self._replicas.copy_events(name, to) if to else self._kept_events(name, copies)

    async def _kept_events(
        self, name: str, copies: int
    ) -> AsyncGenerator[types.ReplicaProgress | types.ModelReplicas, None]:
        """Who holds it in the end, by their own word: also those that hold more copies than are wanted."""
        if copies < 1:
            raise InvalidRequest(f"{copies} copies: at least 1")
        await self._replicas.holders(name)  # raises NotFound
        async with contextlib.aclosing(self._goals.reached_events(name, copies)) as events:
            async for event in events:
                if isinstance(event, types.ReplicaProgress):
                    yield event
        names = sorted(store.name for store, _ in await self._replicas.holders(name))
        yield types.ModelReplicas(name, tuple(names))

    async def replicate(self, name: str, to: str = "", copies: int = 2) -> types.ModelReplicas:
        """See `replicate_events`."""
        async for event in self.replicate_events(name, to, copies):
            if isinstance(event, types.ModelReplicas):
                return event
        raise Unavailable("the copies ended without a word")

    async def add_events(
        self, path: Path | str, name: str = "", mode: str = "copy"
    ) -> AsyncIterator[types.ImportProgress | types.ModelInfo]:
        """Take a GGUF file of the data worker's machine into the store: progress, then the model. Closing the iterator
        leaves nothing of it behind.

        mode: "copy" (hard link, else copy), "move", "link" (hard link, else reference) or "reference" (the file is
        served from where it lies).
        """
        request = model_store_pb2.ImportRequest(path=str(path), id=name, mode=mode)
        async with contextlib.aclosing(self._import(request)) as events:
            async for event in events:
                if not isinstance(event, types.ResolvedSource):
                    yield event

    async def add(self, path: Path | str, name: str = "", mode: str = "copy") -> types.ModelInfo:
        async for event in self.add_events(path, name, mode):
            if isinstance(event, types.ModelInfo):
                return event
        raise Unavailable("the data worker ended the import without a word")

    def pull_events(self, source: str, name: str = "", mode: str = "") -> AsyncGenerator[types.PullEvent, None]:
        """Bring a model from elsewhere into the store: what the source turned out to be, progress, then the model.

        source: hf://OWNER/REPOSITORY[:QUANTIZATION], ollama://NAME[:TAG] or eldric://HOST:PORT/NAME; ModelStore.Import
        says all of it. name: in the store; empty: that of the source. mode: of an Ollama store only, see `add_events`.
        Closing the iterator stops it: what has come is kept, and the same call goes on from there.
        """
        return self._import(model_store_pb2.ImportRequest(source=source, id=name, mode=mode))

    async def pull(self, source: str, name: str = "", mode: str = "") -> types.ModelInfo:
        """See `pull_events`."""
        async for event in self.pull_events(source, name, mode):
            if isinstance(event, types.ModelInfo):
                return event
        raise Unavailable("the data worker ended the pull without a word")

    async def _import(self, request: model_store_pb2.ImportRequest) -> AsyncGenerator[types.PullEvent, None]:
        """Always at the same data worker while it is up: a pull goes on where it was."""
        stub = model_store_pb2_grpc.ModelStoreStub(await self._connections.data_worker(steady=True))
        with self._connections.calling(_DATA_WORKER):
            call = stub.Import(request)
            try:
                async for event in call:
                    yield convert.import_event(event)
            finally:
                call.cancel()

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a model from every data worker that holds it, or the rest of an interrupted pull; no copy is made any
        more. Raises NotFound, and NotReady for one that is deployed, unless that does not matter (force)."""
        if not force:
            await self._goals.check_released(name)
        await self._goals.drop(name)
        missing: list[NotFound] = []
        stores = await self._replicas.stores()
        for store in stores:
            try:
                with self._connections.calling(f"data worker {store.name}"):
                    await store.calls.Remove(model_store_pb2.RemoveModelRequest(id=name, force=force))
            except NotFound as error:
                missing.append(error)
        if len(missing) == len(stores):
            raise missing[0]

    async def verify_events(self, name: str) -> AsyncIterator[types.ImportProgress]:
        """Compare the files with their checksums, on every data worker that holds them. Raises DataLoss, which names
        the data worker and the file that differs."""
        for store in await self._replicas.with_name(name):
            try:
                with self._connections.calling(f"data worker {store.name}"):
                    call = store.calls.Verify(model_store_pb2.ModelRequest(id=name))
                    try:
                        async for event in call:
                            yield types.ImportProgress("verifying", event.done_bytes, event.total_bytes)
                    finally:
                        call.cancel()
            except DataLoss as error:
                raise DataLoss(f"data worker {store.name}: {error.message}") from None
