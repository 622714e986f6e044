"""Keeps the number of copies of models up: looks at the data workers from time to time, and has them copy."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any
from urllib.parse import urlsplit

from eldric.channels import ChannelPool, call_errors
from eldric.controller.cluster import Cluster
from eldric.controller.config import ControllerConfig
from eldric.controller.models import Models
from eldric.controller.nodes import NodeState
from eldric.controller.registry import Node
from eldric.controller.replication import Copy, CopyProgress, Goal, Holding, Replication, Status, StoreView
from eldric.controller.state import Store
from eldric.errors import AlreadyExists, DataLoss, EldricError, InvalidRequest, NotFound, Unavailable
from eldric.replicas import is_same
from eldric.v1 import model_store_pb2, model_store_pb2_grpc

log = logging.getLogger(__name__)

#: Room of a data worker that does not say: it sees by itself whether a copy fits.
_UNKNOWN_BYTES = 1 << 62


class Replicator:
    """Carries out what Replication decides. `open` it before use."""

    def __init__(
        self, config: ControllerConfig, cluster: Cluster, store: Store, models: Models, channels: ChannelPool
    ) -> None:
        self._config, self._cluster, self._store = config, cluster, store
        self._models, self._channels = models, channels
        self._replication = Replication(config.replicate_after_s, config.copies_at_once)
        self._surveying = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._copies: dict[Copy, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Reads the goals that were kept. Raises what Store raises."""
        for goal in await self._store.goals():
            self._replication.set(goal, urgent=False)

    def start(self) -> None:
        self._spawn(self._watch())

    async def close(self) -> None:
        """Ends the copies that are being made; what has come of them stays for the next controller."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def set(self, model: str, copies: int) -> Status | None:
        """Sets or drops a goal; see Replication.Set of the contract. Returns once the copies have begun."""
        if copies <= 1:
            await self._store.delete_goal(model)
            for copy in self._replication.drop(model):
                self._copies[copy].cancel()
            return None
        source = (await self._models.find(model)).source
        goal = Goal(model, copies, source)
        views = await self._views([goal])
        others = [view.name for view in views if view.held.get(model) is Holding.OTHER]
        if others:
            raise AlreadyExists(f"{model!r} is another model, or damaged, on {', '.join(others)}")
        up = sum(view.takes_copies for view in views)
        if copies > up:
            raise InvalidRequest(f"{copies} copies: from 1 to {up}, the number of data workers that are up")
        await self._store.save_goal(goal)
        self._replication.set(goal, urgent=True)
        await self._survey()
        return self.status(model)

    def status(self, model: str) -> Status | None:
        return self._replication.status(model, time.monotonic())

    def statuses(self) -> list[Status]:
        found = [self.status(goal.model) for goal in self._replication.goals]
        return [status for status in found if status is not None]

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.survey_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._survey()
            except Exception:  # the watch over the copies must not end
                log.exception("event=survey_failed")

    async def _survey(self) -> None:
        async with self._surveying:
            goals = self._replication.goals
            if not goals:
                return
            views = await self._views(goals)
            for copy in self._replication.survey(views, time.monotonic()):
                log.info("event=copy_begins model=%s source=%s target=%s", copy.model, copy.source, copy.target)
                task = self._spawn(self._copy(copy))
                self._copies[copy] = task

    async def _views(self, goals: Sequence[Goal]) -> list[StoreView]:
        """The data workers that answer."""
        alive = (NodeState.UP, NodeState.DRAINING)
        nodes = [node for node in self._cluster.nodes("data") if node.state in alive]
        views = await asyncio.gather(*(self._view(node, goals) for node in nodes))
        return [view for view in views if view is not None]

    async def _view(self, node: Node, goals: Sequence[Goal]) -> StoreView | None:
        """What a data worker holds; None where it does not say."""
        try:
            with call_errors(node.id):
                listed = await self._stub(node).List(model_store_pb2.ListModelsRequest(), timeout=self._config.call_s)
                names = {info.id for info in listed.models}
                held = {goal.model: await self._holding(node, goal) for goal in goals if goal.model in names}
        except EldricError as error:
            log.info("event=store_not_seen node=%s error=%r", node.id, error.message)
            return None
        known = {model: holding for model, holding in held.items() if holding is not None}
        free_bytes = listed.free_bytes if listed.HasField("free_bytes") else _UNKNOWN_BYTES
        return StoreView(node.info.name, free_bytes, node.state is NodeState.UP, known)

    async def _holding(self, node: Node, goal: Goal) -> Holding | None:
        request = model_store_pb2.ModelRequest(id=goal.model)
        try:
            with call_errors(node.id):
                metadata = await self._stub(node).Metadata(request, timeout=self._config.call_s)
        except NotFound:
            return None
        except DataLoss:
            return Holding.OTHER
        return Holding.SAME if is_same(goal.source, metadata.source) else Holding.OTHER

    async def _copy(self, copy: Copy) -> None:
        error: EldricError | None = None
        try:
            await self._import(copy)
            log.info("event=copy_made model=%s source=%s target=%s", copy.model, copy.source, copy.target)
        except EldricError as failure:
            error = failure
            log.warning(
                "event=copy_failed model=%s source=%s target=%s error=%r",
                copy.model,
                copy.source,
                copy.target,
                failure.message,
            )
        except asyncio.CancelledError:
            error = Unavailable("the copy was ended")
            raise
        except Exception:
            error = EldricError("the copy failed: see the controller's log")
            log.exception("event=copy_failed model=%s", copy.model)
        finally:
            self._copies.pop(copy, None)
            self._replication.ended(copy, time.monotonic(), error)
            self._wake.set()

    async def _import(self, copy: Copy) -> None:
        source, target = self._node(copy.source), self._node(copy.target)
        address = urlsplit(source.info.http_url).netloc
        request = model_store_pb2.ImportRequest(source=f"eldric://{address}/{copy.model}", id=copy.model)
        with call_errors(target.id):
            call = self._stub(target).Import(request)
            gone = asyncio.create_task(self._cluster.gone(target.id, target.info.incarnation))
            gone.add_done_callback(lambda _: call.cancel())
            try:
                async for event in call:
                    if event.phase:
                        progress = CopyProgress(event.phase, event.done_bytes, event.total_bytes)
                        self._replication.progress(copy, progress)
            except asyncio.CancelledError:
                if gone.done() and not gone.cancelled():
                    raise Unavailable(f"{target.id}: {gone.result()}") from None
                raise
            finally:
                gone.cancel()
                call.cancel()

    def _node(self, name: str) -> Node:
        node = self._cluster.registry.get(f"data/{name}")
        if node is None:
            raise Unavailable(f"data worker {name} has left")
        return node

    def _stub(self, node: Node) -> "model_store_pb2_grpc.ModelStoreAsyncStub":
        info = node.info
        return model_store_pb2_grpc.ModelStoreStub(self._channels.to(info.grpc_address, info.kind, info.name))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
