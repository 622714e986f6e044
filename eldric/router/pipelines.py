"""The pipelines that a router knows, and which of them answer for a name."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from eldric.router.balance import Replica, by_load, others_of
from eldric.router.errors import ModelNotFound, PipelineLoading, PipelineLost
from eldric.v1 import pipeline_pb2, stage_pb2

DEPLOYING, READY, DEGRADED = pipeline_pb2.DEPLOYING, pipeline_pb2.READY, pipeline_pb2.DEGRADED

#: How long a request waits for a pipeline to be ready whose stages are all loaded, in seconds; and for one that is
#: loading as far as this router has heard.
SETTLING_S, NEWS_S = 2.0, 0.3


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach one ready pipeline, and what a request must know of it. context 0: the head knows it."""

    id: str
    name: str
    model: str
    head_address: str
    head_name: str | None  # of the worker; None where only the address is known
    context: int
    source: stage_pb2.ModelSource
    options: bytes  # of the stages, serialized: what a fingerprint of the deployment is made of


@dataclass(slots=True)
class _Entry:
    info: pipeline_pb2.PipelineInfo
    route: Route
    changed: int
    others: int = 0
    own: int = 0
    last_pick: int = 0


@dataclass(slots=True)
class Pipelines:
    """Belongs to the event loop. Keeps what the controller last said and counts this router's own generations."""

    synchronised: bool = False
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _removed: dict[str, int] = field(default_factory=dict)  # when, for lists that were asked for earlier
    _clock: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _news: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, when a pipeline changes

    # What the controller says

    def update(self, info: pipeline_pb2.PipelineInfo) -> None:
        """A pipeline is new or has changed."""
        known = self._entries.get(info.id)
        if known is None:
            self._entries[info.id] = _Entry(info, _route(info), next(self._clock))
        else:
            known.info, known.route, known.changed = info, _route(info), next(self._clock)
        self._tell()

    def remove(self, pipeline_id: str) -> None:
        self._entries.pop(pipeline_id, None)
        self._removed[pipeline_id] = next(self._clock)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def begin_listing(self) -> tuple[int, dict[str, int]]:
        """Call before asking for all pipelines, and give the result to `listed` with the answer."""
        return next(self._clock), {id: entry.own for id, entry in self._entries.items()}

    def listed(self, asked: tuple[int, dict[str, int]], infos: Iterable[pipeline_pb2.PipelineInfo]) -> None:
        """Takes over a complete list. What changed since it was asked for stays as it is."""
        moment, own = asked
        self._removed = {id: when for id, when in self._removed.items() if when > moment}
        seen = set()
        for info in infos:
            if info.id in self._removed:
                continue
            seen.add(info.id)
            entry = self._entries.get(info.id)
            if entry is None or entry.changed < moment:
                self.update(info)
            self._entries[info.id].others = others_of(info.slots_used + info.queued, own.get(info.id, 0))
        for id, entry in list(self._entries.items()):
            if id not in seen and entry.changed < moment:
                del self._entries[id]
        self.synchronised = True

    # What a request asks

    async def settled_routes(self, name: str) -> list[Route]:
        """As `routes`, but waits a moment for a pipeline that is loading, longer for one whose stages are all loaded:
        whoever deployed it may know that it is ready before this router does."""
        began = asyncio.get_running_loop().time()
        while True:
            news = self._news
            try:
                return self.routes(name)
            except PipelineLoading as error:
                patience_s = SETTLING_S if error.progress >= 1 else NEWS_S
                try:
                    async with asyncio.timeout_at(began + patience_s):
                        await news.wait()
                except TimeoutError:
                    raise error from None

    def routes(self, name: str) -> list[Route]:
        """The ready pipelines that answer for a pipeline's or a model's name.

        A pipeline's own name stands for it alone, unless it is also its model's: then all replicas of the model are
        meant. Raises ModelNotFound, PipelineLoading, PipelineLost.
        """
        entries = self._named(name)
        ready = [entry.route for entry in entries if entry.info.state == READY]
        if ready:
            return ready
        loading = [entry.info for entry in entries if entry.info.state == DEPLOYING]
        if loading:
            furthest = max(loading, key=lambda info: info.progress)
            raise PipelineLoading(name, furthest.progress, furthest.message)
        for entry in entries:
            if entry.info.state == DEGRADED:
                raise PipelineLost(f"the model {name!r} cannot answer now: {entry.info.message or 'a stage is lost'}")
        raise ModelNotFound(name, self.names())

    def _named(self, name: str) -> list[_Entry]:
        own = [entry for entry in self._entries.values() if entry.info.name == name]
        if own and all(entry.info.model != name for entry in own):
            return own
        return own + [each for each in self._entries.values() if each.info.model == name and each not in own]

    def names(self) -> list[str]:
        """Every name that a request may ask for: of models and of pipelines."""
        infos = [entry.info for entry in self._entries.values()]
        return sorted({name for info in infos for name in (info.name, info.model) if name})

    def only_name(self) -> str | None:
        """The name that a request means which names none: None when there is more than one model, or none at all."""
        models = {entry.info.model for entry in self._entries.values()}
        if len(models) > 1 or not self._entries:
            return None
        return next(iter(self._entries.values())).info.name if len(self._entries) == 1 else models.pop()

    def infos(self, name: str | None = None) -> list[pipeline_pb2.PipelineInfo]:
        """All pipelines, or those that answer for a name; none raises no error."""
        entries = self._entries.values() if name is None else self._named(name)
        return [entry.info for entry in entries]

    def ready_routes(self) -> list[Route]:
        return [entry.route for entry in self._entries.values() if entry.info.state == READY]

    def by_load(self, routes: Iterable[Route]) -> list[Route]:
        """The routes, the one to try first first. Enter `running` before anything else happens: it is a load."""
        by_id = {route.id: route for route in routes}
        entries = [(id, self._entries.get(id)) for id in by_id]
        replicas = [
            Replica(id, entry.others, entry.own, entry.last_pick) if entry else Replica(id, 0, 0, 0)
            for id, entry in entries
        ]
        return [by_id[id] for id in by_load(replicas)]

    @contextlib.contextmanager
    def running(self, route: Route) -> Iterator[None]:
        """Around a generation at a pipeline: it counts as load of ours."""
        entry = self._entries.get(route.id)
        if entry is None:
            yield
            return
        entry.last_pick = next(self._clock)
        entry.own += 1
        try:
            yield
        finally:
            entry.own -= 1

    # What /health shows

    def health(self) -> tuple[bool, dict[str, object]]:
        """Ready unless there are pipelines and none of them is; with the progress of those that load."""
        infos = self.infos()
        ready = self.synchronised and (not infos or any(info.state == READY for info in infos))
        details: dict[str, object] = {
            "synchronised": self.synchronised,
            "pipelines": [
                {"name": info.name, "model": info.model, "state": state_name(info), "progress": info.progress}
                for info in infos
            ],
        }
        loading = [info.progress for info in infos if info.state == DEPLOYING]
        if loading and not ready:
            details["progress"] = max(loading)
        return ready, details


def state_name(info: pipeline_pb2.PipelineInfo) -> str:
    """ "deploying", "ready", "degraded", "undeploying"; a newer controller's states by their number."""
    try:
        return pipeline_pb2.PipelineState.Name(info.state).lower()
    except ValueError:
        return str(info.state)


def _route(info: pipeline_pb2.PipelineInfo) -> Route:
    return Route(
        id=info.id,
        name=info.name,
        model=info.model,
        head_address=info.head_address,
        head_name=info.head_node.partition("/")[2] or None,
        context=info.options.context,
        source=info.source,
        options=info.options.SerializeToString(deterministic=True),
    )
