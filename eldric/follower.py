"""Sessions with one controller at a time, for nodes that follow what controllers tell."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import grpc

from eldric.channels import call_errors, channel
from eldric.errors import EldricError
from eldric.node import Node

log = logging.getLogger(__name__)

#: Pause before the next controller is tried, in seconds: doubled after each failure up to the maximum.
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0


class ControllerFollower:
    """Runs `session` with a connection to a controller, and again with the next one when it ends or fails."""

    def __init__(self, node: Node, name: str, session: Callable[[grpc.aio.Channel], Awaitable[None]]) -> None:
        """name: of the task. session: returns or raises when its controller is lost."""
        self._node = node
        self._name = name
        self._session = session
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name=self._name)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        controllers = self._node.controllers
        turn, pause_s = 0, FIRST_PAUSE_S
        while True:
            address = controllers[turn % len(controllers)]
            began = asyncio.get_running_loop().time()
            try:
                # A connection of its own each time: a kept one would not try again for as long as it has failed.
                async with channel(address, self._node.identity, "controller") as connection:
                    with call_errors(f"controller at {address}"):
                        await self._session(connection)
            except EldricError as error:
                log.warning("event=%s_lost controller=%s error=%r", self._name, address, error.message)
            except Exception:
                log.exception("event=%s_failed controller=%s", self._name, address)
            if asyncio.get_running_loop().time() - began > MAX_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            turn += 1
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
