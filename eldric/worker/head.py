"""The control side of a pipeline's head: admits generations, hands over what came out, lets steps be followed."""

import asyncio
from collections.abc import AsyncIterator, Callable

from eldric.errors import InvalidRequest, QueueIsFull, Unavailable
from eldric.v1 import stage_pb2
from eldric.worker.commands import Cancel, Command, Follow, Shut, Submit
from eldric.worker.generation import Admitted, Ended, Failed, Generation, Token
from eldric.worker.head_thread import News
from eldric.worker.metrics import WorkerMetrics

#: Step traces that wait for a follower who reads slowly; older ones are dropped.
_FOLLOWED_STEPS = 4096


class Head:
    """Belongs to the control loop, but for `deliver` and `trace`, which the compute thread calls."""

    def __init__(
        self, name: str, vocab_size: int, context: int, limit: int, metrics: WorkerMetrics, embeds: bool = True
    ) -> None:
        """`limit`: generations that may run and wait at once. `embeds`: whether the model's way to do it is known."""
        self.name = name
        self.vocab_size = vocab_size
        self.context = context
        self.embeds = embeds
        self._limit = limit
        self._metrics = metrics.of_pipeline(name)
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, Generation] = {}
        self._followers: set[asyncio.Queue[stage_pb2.StepTrace | None]] = set()
        self._closed = False
        self._shut = ""
        self._post: Callable[[Command], None] = lambda command: None

    def attach(self, post: Callable[[Command], None]) -> None:
        """`post` gives a command to the compute thread."""
        self._post = post

    def submit(self, generation: Generation) -> None:
        """Give a generation to the compute thread.

        Raises Unavailable when it is shut, QueueIsFull, InvalidRequest for a request id in use.
        """
        if self._shut:
            raise Unavailable(self._shut)
        if len(self._live) >= self._limit:
            self._metrics.refused.inc()
            raise QueueIsFull(f"pipeline {self.name!r} has {len(self._live)} requests running and waiting, its limit")
        if generation.sequence.id in self._live:
            raise InvalidRequest(f"a request of the id {generation.sequence.id!r} is running")
        self._live[generation.sequence.id] = generation
        self._metrics.live.set(len(self._live))
        self._post(Submit(generation))

    def shut(self, reason: str) -> None:
        """Take no new generations and end those that wait, for this reason; empty: open again. What runs goes on."""
        if reason and not self._shut:
            self._post(Shut(reason))
        self._shut = reason

    def cancel(self, request_id: str) -> bool:
        """End a generation. False when there is none of that id."""
        generation = self._live.get(request_id)
        if generation is not None:
            self._post(Cancel(generation))
        return generation is not None

    def drop(self, generation: Generation) -> None:
        """End a generation that nobody waits for any more: this one, and none that has taken its id since it ended."""
        if self._live.get(generation.sequence.id) is generation:
            self._post(Cancel(generation))

    @property
    def live(self) -> int:
        """Generations that run or wait."""
        return len(self._live)

    def close(self) -> None:
        """The stage was unloaded: those who follow its steps are told."""
        self._closed = True
        for queue in self._followers:
            _put(queue, None)

    def deliver(self, news: News) -> None:
        """Called by the compute thread."""
        self._loop.call_soon_threadsafe(self._push, news)

    def trace(self, step: stage_pb2.StepTrace) -> None:
        """Called by the compute thread."""
        self._loop.call_soon_threadsafe(self._show, step)

    def _push(self, news: News) -> None:
        for generation, happening in news:
            generation.push(happening)
            if isinstance(happening, Ended | Failed):
                self._live.pop(generation.sequence.id, None)
                self._metrics.live.set(len(self._live))
            self._measure(generation, happening)

    def _measure(self, generation: Generation, happening: Admitted | Token | Ended | Failed) -> None:
        if generation.embeds and isinstance(happening, Token):
            return
        match happening:
            case Admitted(at_ns):
                self._metrics.queue.observe((at_ns - generation.submitted_ns) / 1e9)
            case Token(_, at_ns):
                self._metrics.tokens.inc()
                if generation.last_token_ns:
                    self._metrics.inter_token.observe((at_ns - generation.last_token_ns) / 1e9)
                else:
                    self._metrics.first_token.observe((at_ns - generation.submitted_ns) / 1e9)
                generation.last_token_ns = at_ns
            case Ended(reason, _):
                self._metrics.ended(reason.value)
            case Failed():
                self._metrics.ended("failed")

    async def follow(self) -> AsyncIterator[stage_pb2.StepTrace]:
        """Every step from now on, until the stage is unloaded or the caller closes the iterator."""
        queue: asyncio.Queue[stage_pb2.StepTrace | None] = asyncio.Queue(_FOLLOWED_STEPS)
        self._followers.add(queue)
        self._post(Follow(True))
        try:
            while not self._closed and (step := await queue.get()) is not None:
                yield step
        finally:
            self._followers.discard(queue)
            if not self._followers:
                self._post(Follow(False))

    def _show(self, step: stage_pb2.StepTrace) -> None:
        for queue in self._followers:
            _put(queue, step)


def _put(queue: "asyncio.Queue[stage_pb2.StepTrace | None]", step: stage_pb2.StepTrace | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(step)
