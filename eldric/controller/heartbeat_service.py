"""Heartbeat: one stream per node, its state up, what is wanted of it down."""

import asyncio
from collections.abc import AsyncIterator

from eldric.controller.cluster import Cluster
from eldric.controller.metrics import ControllerMetrics
from eldric.errors import InvalidRequest
from eldric.security.expelled import Expelled
from eldric.v1 import heartbeat_pb2, heartbeat_pb2_grpc

#: Largest beat of a node: the state of some thousand stages.
MAX_BEAT_BYTES = 1 << 20


class HeartbeatService(heartbeat_pb2_grpc.HeartbeatServicer):
    def __init__(self, cluster: Cluster, metrics: ControllerMetrics, expelled: Expelled) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._expelled = expelled

    async def Beat(
        self, request_iterator: AsyncIterator[heartbeat_pb2.BeatRequest], context: object
    ) -> AsyncIterator[heartbeat_pb2.BeatResponse]:
        """Answers every beat, and more often when what is wanted changes."""
        link = _Link(self._cluster, self._metrics, self._expelled)
        reading = asyncio.create_task(link.read(request_iterator))
        reading.add_done_callback(lambda _: link.wake.set())
        try:
            while True:
                await link.wake.wait()
                link.wake.clear()
                if reading.done():
                    reading.result()
                    return
                yield link.answer()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            link.close()


class _Link:
    """One node's stream, opened by its first beat."""

    def __init__(self, cluster: Cluster, metrics: ControllerMetrics, expelled: Expelled) -> None:
        self._expelled = expelled
        self.wake = asyncio.Event()
        self._cluster = cluster
        self._metrics = metrics
        self._node_id = ""
        self._link = 0
        self._sequence = 0

    async def read(self, requests: AsyncIterator[heartbeat_pb2.BeatRequest]) -> None:
        """Takes beats until the node ends the stream. Raises NotFound when it must register first."""
        async for request in requests:
            if request.ByteSize() > MAX_BEAT_BYTES:
                raise InvalidRequest(f"a beat of {request.ByteSize()} bytes, {MAX_BEAT_BYTES} may be")
            if not self._link:
                self._node_id = request.node_id
                self._link = self._cluster.open_link(request.node_id, request.incarnation, self.wake)
            elif request.node_id != self._node_id:
                raise InvalidRequest(f"a stream of {self._node_id} with a beat of {request.node_id}")
            self._cluster.beat(request)
            self._metrics.beats.labels(request.node_id.partition("/")[0]).inc()
            self._sequence = request.sequence
            self.wake.set()

    def answer(self) -> heartbeat_pb2.BeatResponse:
        wanted = self._cluster.wanted(self._node_id)
        return heartbeat_pb2.BeatResponse(
            sequence=self._sequence, wanted=wanted, expelled=sorted(self._expelled.node_ids)
        )

    def close(self) -> None:
        if self._link:
            self._cluster.close_link(self._node_id, self._link, self.wake)
