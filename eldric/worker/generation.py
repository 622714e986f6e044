"""One generation as the head's two sides see it: the control loop submits it, the compute thread feeds it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eldric.engine.schedule import Finish
from eldric.engine.schedule import Sequence as EngineSequence
from eldric.v1 import frame_pb2, sampling_pb2


class Admitted(NamedTuple):
    """The sequence took a slot."""

    at_ns: int


class Token(NamedTuple):
    """The tail sampled a token, or has the embedding."""

    sampled: frame_pb2.SampledToken
    at_ns: int


class Ended(NamedTuple):
    """The sequence ended as it should."""

    reason: Finish
    at_ns: int


class Failed(NamedTuple):
    """The sequence cannot go on."""

    error: Exception


Happening = Admitted | Token | Ended | Failed


@dataclass(slots=True, eq=False)
class Generation:
    """A sequence with what came out of it so far. `push` and `happenings` belong to the control loop."""

    sequence: EngineSequence
    sampling: sampling_pb2.SamplingParams
    embeds: bool = False  # what comes out is one embedding, in place of a token
    submitted_ns: int = field(default_factory=time.perf_counter_ns)
    last_token_ns: int = 0  # 0: no token yet
    _pending: deque[Happening] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, happening: Happening) -> None:
        self._pending.append(happening)
        self._arrived.set()

    async def happenings(self) -> AsyncIterator[Sequence[Happening]]:
        """Everything since the last look, at least one, until the end. A slow reader gets more at a time."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            batch = tuple(self._pending)
            self._pending.clear()
            yield batch
            if isinstance(batch[-1], Ended | Failed):
                return
