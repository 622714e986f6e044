"""Calls to nodes: what the controller asks of workers, and whether a node is there at all."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eldric.channels import ChannelPool, call_errors, channel
from eldric.controller.config import ControllerConfig
from eldric.controller.registry import Node
from eldric.errors import DeadlineExceeded, Unavailable
from eldric.security import Identity
from eldric.v1 import stage_pb2, stage_pb2_grpc


class Workers:
    """The network side of the controller. Every call has a deadline and raises what the node raised, as EldricError."""

    def __init__(self, config: ControllerConfig, channels: ChannelPool, identity: Callable[[], Identity]) -> None:
        self._config = config
        self._channels = channels
        self._identity = identity

    async def load(
        self, node: Node, request: stage_pb2.LoadRequest, progress: Callable[[stage_pb2.LoadProgress], None]
    ) -> stage_pb2.Loaded:
        """Loads a stage; cancelling unloads it. Raises DeadlineExceeded when the worker says nothing for long."""
        idle_s = self._config.load_idle_s
        with call_errors(node.id):
            call = self._stub(node).Load(request)
            try:
                async with asyncio.timeout(idle_s) as idle:
                    async for event in call:
                        if event.HasField("loaded"):
                            return event.loaded
                        progress(event.progress)
                        idle.reschedule(asyncio.get_running_loop().time() + idle_s)
            except TimeoutError:
                raise DeadlineExceeded(f"no progress for {idle_s:g} s") from None
            finally:
                call.cancel()
        raise Unavailable("the load ended before the stage was there")

    async def open_links(self, node: Node, request: stage_pb2.OpenLinksRequest) -> stage_pb2.OpenLinksResponse:
        """Settles what a stage receives and sends with."""
        with call_errors(node.id):
            return await self._stub(node).OpenLinks(request, timeout=self._config.call_s)

    async def connect(self, node: Node, request: stage_pb2.ConnectRequest) -> str:
        """Names a stage's neighbours. Returns why the next one cannot be reached; empty when it is."""
        with call_errors(node.id):
            answer = await self._stub(node).Connect(request, timeout=self._config.call_s)
            return answer.problem

    async def switch(self, node: Node, request: stage_pb2.ConnectRequest) -> bool:
        """Lets a stage go over to links that were made beside those it has; False: the head has sequences.

        Raises Unavailable when that fails.
        """
        with call_errors(node.id):
            answer = await self._stub(node).Connect(request, timeout=self._config.call_s)
        if answer.problem:
            raise Unavailable(answer.problem)
        return not answer.busy

    async def statuses(
        self, node: Node, pipeline_id: str = "", timeout_s: float | None = None
    ) -> list[stage_pb2.StageStatus]:
        """The stages that a worker holds; only those of one pipeline where it is named."""
        with call_errors(node.id):
            request = stage_pb2.StageStatusRequest(pipeline_id=pipeline_id)
            answer = await self._stub(node).Status(request, timeout=timeout_s or self._config.call_s)
            return list(answer.stages)

    async def unload(
        self, node: Node, pipeline_id: str, epoch: int = 0, index: int | None = None, reason: str = ""
    ) -> None:
        """Unloads a pipeline's stages: up to an epoch (0: any), only one index where it is given.

        reason: what the sequences that run are told.
        """
        with call_errors(node.id):
            request = stage_pb2.UnloadRequest(pipeline_id=pipeline_id, epoch=epoch, index=index, reason=reason)
            await self._stub(node).Unload(request, timeout=self._config.call_s)

    async def probe(self, node: Node) -> bool | None:
        """Whether a node's process is there: True when it answers, False when nobody listens, None when it is silent.

        Over a connection of its own: a kept one may not have noticed yet.
        """
        info = node.info
        async with channel(info.grpc_address, self._identity(), info.kind, info.name) as connection:
            health = health_pb2_grpc.HealthStub(connection)
            try:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=self._config.probe_ms / 1000)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return False
                return None if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else True
            return True

    async def forget(self, address: str) -> None:
        """Closes the connections to an address, and ends their calls."""
        await self._channels.forget(address)

    def _stub(self, node: Node) -> "stage_pb2_grpc.StageAsyncStub":
        info = node.info
        return stage_pb2_grpc.StageStub(self._channels.to(info.grpc_address, info.kind, info.name))
