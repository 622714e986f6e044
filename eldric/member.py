"""Membership of a cluster: registers a node with a controller and keeps its pulse."""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from eldric import PROTOCOL, __version__
from eldric.channels import call_errors, channel
from eldric.errors import (
    DeadlineExceeded,
    EldricError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)
from eldric.node import Node
from eldric.v1 import heartbeat_pb2, heartbeat_pb2_grpc, registry_pb2, registry_pb2_grpc

log = logging.getLogger(__name__)

Beat = Callable[[], heartbeat_pb2.BeatRequest]
OnAnswer = Callable[[heartbeat_pb2.BeatResponse], Awaitable[None]]

REGISTER_TIMEOUT_S = 5.0
DEREGISTER_TIMEOUT_S = 0.8

#: Pause before the next controller is tried, in seconds: doubled after each failure up to the maximum.
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
#: Refusals that trying again will not change by itself, and the pause after them.
REFUSALS = (VersionMismatch, PermissionDenied, Unauthenticated)
REFUSED_PAUSE_S = 5.0
#: Least time between two beats, however often something changes.
MIN_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the controller asked for, in seconds: the time between beats, and the silence that counts as lost."""

    interval_s: float = 1.0
    lease_s: float = 3.0


class Member:
    """Registers `node`, beats, and deregisters when the node stops. It hooks itself into the node's start and stop.

    Controllers are tried in turn until one takes the node; when its stream breaks or it stays silent for a lease, the
    next one is. A controller that does not know the node any more (NOT_FOUND) gets a new registration at once.
    """

    def __init__(
        self,
        node: Node,
        resources: Callable[[], registry_pb2.Resources] | None = None,
        beat: Beat | None = None,
        on_answer: OnAnswer | None = None,
    ) -> None:
        """`beat` gives the node's state (stages, memory_used_bytes); node_id, incarnation, sequence and draining are
        filled in here. `on_answer` gets the newest answer; while it runs, beats go on and older answers are skipped.
        """
        #: Set while a controller knows this node and answers its beats.
        self.registered = asyncio.Event()
        #: Address of the controller that is used now.
        self.controller = ""
        self._node = node
        self._resources = resources
        self._beat = beat
        self._on_answer = on_answer
        self._known = False
        self._sequence = 0
        self._wake = asyncio.Event()
        self._answers: asyncio.Queue[heartbeat_pb2.BeatResponse] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []
        node.on_start(self._start)
        node.on_drain(self._drain)
        node.on_stop(self._stop)
        node.health(self._look)

    def beat_now(self) -> None:
        """Sends a beat at once: something changed."""
        self._wake.set()

    async def _start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep_registered(), name="member"),
            asyncio.create_task(self._handle_answers(), name="member answers"),
        ]

    async def _drain(self) -> None:
        self.beat_now()  # tells the controller that the node is draining

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.registered.clear()
        if not self._known:
            return
        request = registry_pb2.DeregisterRequest(node_id=self._node.config.node_id)
        try:
            async with self._channel() as connection:
                with call_errors(f"controller at {self.controller}"):
                    stub = registry_pb2_grpc.RegistryStub(connection)
                    await stub.Deregister(request, timeout=DEREGISTER_TIMEOUT_S)
        except EldricError as error:
            log.warning("event=deregister_failed controller=%s error=%r", self.controller, error.message)

    def _look(self) -> tuple[bool, dict[str, Any]]:
        """For /health: a node that lost its controller goes on with what it has."""
        return True, {"registered": self.registered.is_set(), "controller": self.controller}

    def _channel(self) -> grpc.aio.Channel:
        return channel(self.controller, self._node.identity, "controller")

    async def _keep_registered(self) -> None:
        controllers = self._node.controllers
        turn, pause_s = 0, FIRST_PAUSE_S
        while True:
            self.controller = controllers[turn % len(controllers)]
            problem = await self._session()
            if self.registered.is_set():
                pause_s = FIRST_PAUSE_S
                self.registered.clear()
                if isinstance(problem, NotFound):
                    log.info("event=registering_again controller=%s", self.controller)
                    continue
            log.warning("event=controller_lost controller=%s error=%r", self.controller, problem.message)
            turn += 1
            await asyncio.sleep(_pause(problem, pause_s))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def _session(self) -> EldricError:
        """Registers with `self.controller` and beats until something goes wrong; returns what."""
        peer = f"controller at {self.controller}"
        try:
            async with self._channel() as connection:
                with call_errors(peer):
                    pulse = await self._register(connection)
                    await self._keep_beating(connection, pulse)
        except EldricError as error:
            return error
        except TimeoutError:
            return DeadlineExceeded(f"{peer} answers no beat")
        except Exception as error:
            log.exception("event=session_failed controller=%s", self.controller)
            return EldricError(f"{type(error).__name__} in a session with the {peer}")
        return Unavailable(f"{peer} ended the stream of beats")

    async def _register(self, connection: grpc.aio.Channel) -> Pulse:
        node = self._node
        kind = registry_pb2.NodeKind.Value(node.config.kind.upper())
        described = registry_pb2.Node(
            id=node.config.node_id,
            name=node.config.name,
            kind=kind,
            grpc_address=node.grpc_address,
            http_url=node.http_url,
            version=__version__,
            protocol=PROTOCOL,
            pid=os.getpid(),
            incarnation=node.incarnation,
            resources=self._resources() if self._resources is not None else None,
            edge_id=node.edge_id,
        )
        request = registry_pb2.RegisterRequest(node=described)
        answer = await registry_pb2_grpc.RegistryStub(connection).Register(request, timeout=REGISTER_TIMEOUT_S)
        if answer.protocol not in (0, PROTOCOL):
            raise VersionMismatch(f"this node speaks protocol {PROTOCOL}, the controller {answer.protocol}")
        self._known = True
        log.info("event=registered controller=%s", self.controller)
        usual = Pulse()
        return Pulse(answer.beat_interval_ms / 1000 or usual.interval_s, answer.lease_ms / 1000 or usual.lease_s)

    async def _keep_beating(self, connection: grpc.aio.Channel, pulse: Pulse) -> None:
        """Returns when the controller ends the stream. Raises TimeoutError when it is silent for a lease."""
        call = heartbeat_pb2_grpc.HeartbeatStub(connection).Beat(self._beats(pulse))
        try:
            while True:
                async with asyncio.timeout(pulse.lease_s):
                    answer = await call.read()
                if not isinstance(answer, heartbeat_pb2.BeatResponse):
                    return
                self.registered.set()
                self._node.expelled.replace(answer.expelled)
                if self._answers.full():
                    self._answers.get_nowait()
                self._answers.put_nowait(answer)
        finally:
            call.cancel()

    async def _beats(self, pulse: Pulse) -> AsyncIterator[heartbeat_pb2.BeatRequest]:
        """Until the node has another address: then it must register again."""
        address = self._node.grpc_address, self._node.http_url
        while address == (self._node.grpc_address, self._node.http_url):
            self._wake.clear()
            if (beat := self._next_beat()) is not None:
                yield beat
            shortest_s = min(MIN_INTERVAL_S, pulse.interval_s)
            await asyncio.sleep(shortest_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pulse.interval_s - shortest_s):
                    await self._wake.wait()

    def _next_beat(self) -> heartbeat_pb2.BeatRequest | None:
        """The node's state; None when it cannot be told, so that a controller does not take less for all."""
        beat = heartbeat_pb2.BeatRequest()
        if self._beat is not None:
            try:
                beat.CopyFrom(self._beat())
            except Exception:
                log.exception("event=beat_failed")
                return None
        self._sequence += 1
        beat.node_id = self._node.config.node_id
        beat.incarnation = self._node.incarnation
        beat.sequence = self._sequence
        beat.draining = self._node.draining
        return beat

    async def _handle_answers(self) -> None:
        while True:
            answer = await self._answers.get()
            if self._on_answer is not None:
                try:
                    await self._on_answer(answer)
                except Exception:
                    log.exception("event=answer_failed")


def _pause(problem: EldricError, pause_s: float) -> float:
    if isinstance(problem, REFUSALS):
        pause_s = REFUSED_PAUSE_S
    return pause_s * random.uniform(0.8, 1.2)
