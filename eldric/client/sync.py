"""The synchronous client: the asynchronous one on an event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from eldric.client import types
from eldric.client.aio import AsyncClient
from eldric.client.cluster import Cluster
from eldric.errors import Unavailable

T = TypeVar("T")

#: Longest wait for a cancelled call to end, in seconds.
_CANCEL_S = 5.0


#: What a stream of events is here; closing it cancels what was asked for.
Events = Generator[T, None, None]


class Client:
    """Like AsyncClient, for code without an event loop. Close it, or use it in `with`. May be shared by threads."""

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        folder: Path | str | None = None,
        controller: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="eldric-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(_make(cluster, folder, controller, timeout_s))
        except BaseException:
            self._stop_loop()
            raise
        self.models = SyncModels(self, self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            try:
                self._run(self._shut())
            finally:
                self._stop_loop()

    @property
    def cluster(self) -> Cluster:
        return self._client.cluster

    def plan(self, model: str, **options: Any) -> types.Plan:
        return self._run(self._client.plan(model, **options))

    def deploy(self, model: str, **options: Any) -> types.PipelineInfo:
        return self._run(self._client.deploy(model, **options))

    def deploy_events(self, model: str, **options: Any) -> Events[types.DeployEvent]:
        return self._iterate(self._client.deploy_events(model, **options))

    def rebalance_events(self, name: str, *, timeout_s: float | None = None) -> Events[types.DeployEvent]:
        return self._iterate(self._client.rebalance_events(name, timeout_s=timeout_s))

    def undeploy(self, name: str) -> None:
        self._run(self._client.undeploy(name))

    def status(self, name: str = "") -> list[types.PipelineInfo]:
        return self._run(self._client.status(name))

    def workers(self) -> list[types.Worker]:
        return self._run(self._client.workers())

    def nodes(self) -> list[types.NodeInfo]:
        return self._run(self._client.nodes())

    def create_token(self, *, lifetime_s: int = 3600, uses: int = 1, kind: str = "") -> str:
        return self._run(self._client.create_token(lifetime_s=lifetime_s, uses=uses, kind=kind))

    def expel(self, node_id: str = "") -> list[str]:
        """See AsyncClient.expel."""
        return self._run(self._client.expel(node_id))

    def generate(self, model: str, prompt: str | Sequence[int], **options: Any) -> Events[types.Event]:
        """See AsyncClient.generate."""
        return self._iterate(self._client.generate(model, prompt, **options))

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> Events[types.Event]:
        """See AsyncClient.chat."""
        return self._iterate(self._client.chat(model, messages, **options))

    def complete(self, model: str, prompt: str | Sequence[int], **options: Any) -> types.Answer:
        """`generate`, read to its end."""
        return self._run(self._client.complete(model, prompt, **options))

    def embed(self, model: str, text: str | Sequence[int], *, timeout_s: float | None = None) -> types.Embedding:
        """See AsyncClient.embed."""
        return self._run(self._client.embed(model, text, timeout_s=timeout_s))

    def tokenize(self, model: str, text: str, *, special: bool = False) -> list[int]:
        return self._run(self._client.tokenize(model, text, special=special))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises what the work raises. An interrupt cancels the work and waits for its end."""
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda task: _settle(outcome, task))

        def cancel() -> None:
            if not tasks:  # the interrupt came before it began
                work.close()
                outcome.set_exception(Unavailable("the call was cancelled"))
            for task in tasks:
                task.cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            return outcome.result()
        except BaseException:
            if not outcome.done():
                self._loop.call_soon_threadsafe(cancel)
                wait([outcome], _CANCEL_S)
            raise

    def _iterate(self, events: AsyncIterator[T]) -> Events[T]:
        """Closing the iterator, or an interrupt, closes the asynchronous one: what was asked for is cancelled."""
        iterator = events.__aiter__()
        try:
            while True:
                try:
                    yield self._run(_next(iterator))
                except StopAsyncIteration:
                    return
        finally:
            if not self._loop.is_closed():
                self._run(_close(iterator))

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        """Iterators that were left behind end first, and with them their calls."""
        await self._loop.shutdown_asyncgens()
        await self._client.close()
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:  # of gRPC, which puts its calls away
            await asyncio.wait(rest, timeout=_CANCEL_S)


class SyncModels:
    """The model store."""

    def __init__(self, client: Client, asynchronous: AsyncClient) -> None:
        self._client = client
        self._models = asynchronous.models

    def list(self) -> list[types.ModelInfo]:
        return self._client._run(self._models.list())

    def show(self, name: str) -> types.ModelDetails:
        return self._client._run(self._models.show(name))

    def add(self, path: Path | str, name: str = "", mode: str = "copy") -> types.ModelInfo:
        return self._client._run(self._models.add(path, name, mode))

    def add_events(
        self, path: Path | str, name: str = "", mode: str = "copy"
    ) -> Events[types.ImportProgress | types.ModelInfo]:
        return self._client._iterate(self._models.add_events(path, name, mode))

    def pull(self, source: str, name: str = "", mode: str = "") -> types.ModelInfo:
        """See Models.pull_events."""
        return self._client._run(self._models.pull(source, name, mode))

    def pull_events(self, source: str, name: str = "", mode: str = "") -> Events[types.PullEvent]:
        """See Models.pull_events."""
        return self._client._iterate(self._models.pull_events(source, name, mode))

    def replicate_events(
        self, name: str, to: str = "", copies: int = 2
    ) -> Events[types.ReplicaProgress | types.ModelReplicas]:
        """See Models.replicate_events."""
        return self._client._iterate(self._models.replicate_events(name, to, copies))

    def replicate(self, name: str, to: str = "", copies: int = 2) -> types.ModelReplicas:
        """See Models.replicate_events."""
        return self._client._run(self._models.replicate(name, to, copies))

    def remove(self, name: str, *, force: bool = False) -> None:
        self._client._run(self._models.remove(name, force=force))

    def verify_events(self, name: str) -> Events[types.ImportProgress]:
        return self._client._iterate(self._models.verify_events(name))


async def _make(
    cluster: Cluster | None, folder: Path | str | None, controller: str | None, timeout_s: float
) -> AsyncClient:
    """gRPC binds a channel to the loop that runs when it is made."""
    return AsyncClient(cluster, folder=folder, controller=controller, timeout_s=timeout_s)


def _settle(outcome: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        outcome.set_exception(Unavailable("the call was cancelled"))
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


async def _next(iterator: AsyncIterator[T]) -> T:
    return await iterator.__anext__()


async def _close(iterator: AsyncIterator[Any]) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
