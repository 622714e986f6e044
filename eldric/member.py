"""Membership of a cluster: registers a node with a controller and keeps its pulse."""

import asyncio
from collections.abc import Awaitable, Callable

from eldric.node import Node
from eldric.v1 import heartbeat_pb2, registry_pb2


class Member:
    """Registers `node`, beats, and deregisters when the node stops. It hooks itself into the node's start and stop."""

    def __init__(
        self,
        node: Node,
        resources: Callable[[], registry_pb2.Resources] | None = None,
        beat: Callable[[], heartbeat_pb2.BeatRequest] | None = None,
        on_answer: Callable[[heartbeat_pb2.BeatResponse], Awaitable[None]] | None = None,
    ) -> None:
        """`beat` gives the node's state (stages, memory_used_bytes); node_id, incarnation, sequence and draining are
        filled in here. `on_answer` gets the newest answer; while it runs, beats go on and older answers are skipped.
        """
        #: Set while a controller knows this node and answers its beats.
        self.registered = asyncio.Event()
        #: Address of the controller that is used now.
        self.controller = ""

    def beat_now(self) -> None:
        """Sends a beat at once: something changed."""
        raise NotImplementedError
