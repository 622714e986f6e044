"""Work on a pipeline that goes on in a task of its own while somebody, or nobody, follows it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from eldric.errors import Unavailable
from eldric.v1 import pipeline_pb2

#: Events that a slow follower may be behind; of progress only the newest counts.
MAX_EVENTS = 256


Work = Callable[["Operation"], Coroutine[Any, Any, pipeline_pb2.PipelineInfo]]


class Operation:
    """A deploy, undeploy or rebalance in progress."""

    def __init__(self, work: Work, on_end: Callable[[], None]) -> None:
        """Starts `work`, which gets this operation and may call `emit`; `on_end` is called when it is over."""
        self._events: asyncio.Queue[pipeline_pb2.DeployEvent | None] = asyncio.Queue(MAX_EVENTS)
        self._task = asyncio.create_task(work(self))
        self._on_end = on_end
        self._task.add_done_callback(self._ended)

    def emit(self, event: pipeline_pb2.DeployEvent | None) -> None:
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(event)

    def emit_stage(self, progress: pipeline_pb2.StageProgress) -> None:
        self.emit(pipeline_pb2.DeployEvent(stage=progress))

    def cancel(self) -> None:
        """Asks it to end; what it has done so far is undone."""
        self._task.cancel()

    async def ended(self) -> None:
        """Returns when it is over, however it ended."""
        await asyncio.wait({self._task})

    async def follow(self) -> AsyncGenerator[pipeline_pb2.DeployEvent, None]:
        """Its events, the last with the pipeline that is ready. Raises its error; leaving early cancels it."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
            if self._task.cancelled():
                raise Unavailable("it was ended before the pipeline was ready: undeployed, or its controller is ending")
            yield pipeline_pb2.DeployEvent(ready=self._task.result())
        finally:
            if not self._task.done():
                self.cancel()

    def _ended(self, task: asyncio.Task[pipeline_pb2.PipelineInfo]) -> None:
        if not task.cancelled():
            task.exception()  # it was seen, even when nobody follows
        self._on_end()
        self.emit(None)
