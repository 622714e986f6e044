"""Servers of asyncio in a process that has run out of open files.

asyncio takes as many connections at a time as its backlog says, and does not stop at the first that fails: for each it
logs a traceback and starts a timer, thousands of times a second. Servers here take one at a time, so it tries once a
second, and says so in one line.
"""

import asyncio
import logging
import math
import resource
import time
from typing import Any

log = logging.getLogger(__name__)

#: The backlog to make a server of asyncio with.
ONE_AT_A_TIME = 1
#: Time between two lines about the same, in seconds.
_SAY_AGAIN_S = 30.0


def queueing(server: asyncio.Server, connections: int) -> asyncio.Server:
    """A server that was made with ONE_AT_A_TIME, now with a queue for so many connections that nobody took yet."""
    for each in server.sockets:
        with each.dup() as listener:
            listener.listen(connections)
    return server


class LoopErrors:
    """An event loop's exception handler. Calls of asyncio's own for all but failures to accept."""

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "accept" not in context.get("message", "") or not isinstance(error, OSError):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said_at >= _SAY_AGAIN_S:
            self._said_at = time.monotonic()
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "event=connections_wait error=%r open_files_limit=%d: raise it (ulimit -n, LimitNOFILE=)",
                error.strerror,
                limit,
            )
