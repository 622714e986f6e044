"""The cluster's data workers together: who holds a model, and a copy of it on one more of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from eldric.channels import call_errors
from eldric.client import convert, types
from eldric.client.connections import Connections, none_up
from eldric.client.copy_goals import CopyGoals
from eldric.errors import AlreadyExists, EldricError, NotFound
from eldric.nearest import known_names
from eldric.replicas import is_same
from eldric.v1 import model_store_pb2, model_store_pb2_grpc, registry_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Store:
    """One data worker that is up."""

    node: registry_pb2.Node
    calls: "model_store_pb2_grpc.ModelStoreAsyncStub"

    @property
    def name(self) -> str:
        return self.node.name


class Replicas:
    """Its methods raise Unavailable when no data worker is up, and pass over one that does not answer beside others."""

    def __init__(self, connections: Connections) -> None:
        self._connections, self._timeout_s = connections, connections.timeout_s
        self._goals = CopyGoals(connections)

    async def stores(self) -> list[Store]:
        """The data workers that are up, by name."""
        found = [node for node in await self._connections.nodes(registry_pb2.DATA) if node.state == registry_pb2.UP]
        if not found:
            raise none_up(registry_pb2.DATA)
        made = []
        for node in sorted(found, key=lambda each: each.name):
            channel = self._connections.to(node.grpc_address, "data", node.name)
            made.append(Store(node, model_store_pb2_grpc.ModelStoreStub(channel)))
        return made

    async def models(self) -> list[types.ModelInfo]:
        """The models of all data workers, each once, by name."""

        async def ask(store: Store) -> model_store_pb2.ListModelsResponse:
            return await store.calls.List(model_store_pb2.ListModelsRequest(), timeout=self._timeout_s)

        answers = await self._ask_all(await self.stores(), ask)
        found: dict[str, types.ModelInfo] = {}
        copies: Counter[str] = Counter()
        for _, answer in answers:
            for info in answer.models:
                copies[info.id] += 1
                known = found.get(info.id)
                if known is None or (known.problem and not info.problem):  # damaged here, sound there
                    found[info.id] = convert.model(info)
        wanted = await self._goals.all()
        return [convert.with_copies(found[name], copies[name], wanted[name]) for name in sorted(found)]

    async def holders(self, model: str) -> list[tuple[Store, model_store_pb2.ModelMetadata]]:
        """Who holds a model, with what each says of it. Raises NotFound, or why a data worker cannot say."""
        return await self._holders(await self.stores(), model)

    async def _holders(self, stores: Sequence[Store], model: str) -> list[tuple[Store, model_store_pb2.ModelMetadata]]:
        async def ask(store: Store) -> model_store_pb2.ModelMetadata:
            return await store.calls.Metadata(model_store_pb2.ModelRequest(id=model), timeout=self._timeout_s)

        return await self._ask_all(stores, ask)

    async def with_name(self, model: str) -> list[Store]:
        """Who lists a model of that name, also one that is damaged or of another program version. Raises NotFound."""
        stores = await self.stores()

        async def ask(store: Store) -> list[str]:
            answer = await store.calls.List(model_store_pb2.ListModelsRequest(), timeout=self._timeout_s)
            return [info.id for info in answer.models]

        answers = await self._ask_all(stores, ask)
        found = [store for store, names in answers if model in names]
        if not found:
            known = sorted({name for _, names in answers for name in names})
            raise NotFound(f"the model store has no model {model!r}; {known_names(model, known)}")
        return found

    async def copy_events(
        self, model: str, to: str
    ) -> AsyncGenerator[types.ReplicaProgress | types.ModelReplicas, None]:
        """Have the data worker `to` copy a model from one that holds it: progress, then who holds it now.

        Closing the iterator stops it; what has come is kept, and the same call goes on from there. Raises NotFound,
        AlreadyExists when another model has the name there, and what an import raises.
        """
        stores = await self.stores()
        holders = await self._holders(stores, model)
        source, metadata = holders[0]
        others = [store.name for store, held in holders if not is_same(held.source, metadata.source)]
        if others:
            raise AlreadyExists(f"{model!r} is another model on {', '.join(others)} than on {source.name}")
        target = next((store for store in stores if store.name == to), None)
        if target is None:
            there = known_names(to, [store.name for store in stores])
            raise NotFound(f"there is no data worker {to!r} that is up; {there}")
        names = {store.name for store, _ in holders}
        if target.name not in names:
            async for event in self._copy(model, source, target):
                yield event
        yield types.ModelReplicas(model, tuple(sorted({*names, target.name})))

    async def _copy(self, model: str, source: Store, target: Store) -> AsyncGenerator[types.ReplicaProgress, None]:
        address = urlsplit(source.node.http_url).netloc
        request = model_store_pb2.ImportRequest(source=f"eldric://{address}/{model}", id=model)
        with call_errors(f"data worker {target.name}"):
            call = target.calls.Import(request)
            try:
                async for event in call:
                    made = convert.import_event(event)
                    if isinstance(made, types.ImportProgress):
                        yield types.ReplicaProgress(target.name, made.phase, made.done_bytes, made.total_bytes)
            finally:
                call.cancel()

    async def _ask_all(self, stores: Sequence[Store], ask: Callable[[Store], Awaitable[T]]) -> list[tuple[Store, T]]:
        """What each answers. Raises the first error when nobody does, NotFound last."""

        async def one(store: Store) -> T | EldricError:
            try:
                with call_errors(f"data worker {store.name}"):
                    return await ask(store)
            except EldricError as error:
                return error

        answers = await asyncio.gather(*(one(store) for store in stores))
        good = [(store, each) for store, each in zip(stores, answers, strict=True) if not isinstance(each, EldricError)]
        if not good:
            errors = [each for each in answers if isinstance(each, EldricError)]
            raise min(errors, key=lambda error: isinstance(error, NotFound))
        return good
