"""The node's tunnel, as its stages use it from their own threads."""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

from eldric.errors import InvalidRequest, Unavailable
from eldric.names import split_address
from eldric.node import Node
from eldric.tunnel.client import TunnelClient
from eldric.v1 import stage_pb2

#: Longest wait for the control loop and the edge, in seconds.
_ANSWER_S = 12.0
#: How long a data worker is tried directly, in seconds.
_DIRECT_S = 1.0


class NodeRelay:
    """See transport.base.Relay."""

    def __init__(self, node: Node, tunnel: TunnelClient) -> None:
        self._tunnel = tunnel
        self._loop: asyncio.AbstractEventLoop | None = None
        node.on_start(self.start)

    async def start(self) -> None:
        """In the control loop."""
        self._loop = asyncio.get_running_loop()

    def expose(self, host: str, port: int) -> str:
        return self._answer(self._tunnel.expose(host, port))

    def withdraw(self, address: str) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tunnel.withdraw, address)

    def reach(self, address: str) -> str:
        return self._answer(self._tunnel.reach(address))

    def reachable(self, source: stage_pb2.ModelSource) -> stage_pb2.ModelSource:
        """The source with its data workers at addresses that lead there from here: directly, or through the edge."""
        made = stage_pb2.ModelSource()
        made.CopyFrom(source)
        for place in made.places:
            address = place.http_url.partition("://")[2]
            if not _connects(address):
                place.http_url = f"https://{self.reach(address)}"
        return made

    def _answer(self, work: Coroutine[Any, Any, str]) -> str:
        if self._loop is None:
            work.close()
            raise Unavailable("the node has not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_S)


def _connects(address: str) -> bool:
    """Whether somebody takes a connection there, or nobody ever could."""
    try:
        socket.create_connection(split_address(address), _DIRECT_S).close()
    except OSError:
        return False
    except InvalidRequest:
        return True
    return True


def relay_of(node: Node) -> NodeRelay | None:
    """The relay of a node behind an edge; None for one that is reached directly."""
    return NodeRelay(node, node.tunnel) if node.tunnel is not None else None
