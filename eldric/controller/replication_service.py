"""Replication: how many data workers should hold a model."""

import math

from eldric.controller.releases import Releases
from eldric.controller.replication import Status
from eldric.controller.replicator import Replicator
from eldric.errors import InvalidRequest
from eldric.v1 import replication_pb2, replication_pb2_grpc


class ReplicationService(replication_pb2_grpc.ReplicationServicer):
    def __init__(self, replicator: Replicator, releases: Releases) -> None:
        self._replicator, self._releases = replicator, releases

    async def Set(
        self, request: replication_pb2.SetReplicationRequest, context: object
    ) -> replication_pb2.ModelReplication:
        if not request.model:
            raise InvalidRequest("the request names no model")
        status = await self._replicator.set(request.model, request.copies)
        if status is None:
            return replication_pb2.ModelReplication(model=request.model)
        return _message(status)

    async def List(
        self, request: replication_pb2.ListReplicationRequest, context: object
    ) -> replication_pb2.ListReplicationResponse:
        models = [_message(status) for status in self._replicator.statuses()]
        return replication_pb2.ListReplicationResponse(models=models)

    async def Release(
        self, request: replication_pb2.ReleaseRequest, context: object
    ) -> replication_pb2.ReleaseResponse:
        if not request.model:
            raise InvalidRequest("the request names no model")
        await self._releases.check(request.model, request.node_id)
        return replication_pb2.ReleaseResponse()


def _message(status: Status) -> replication_pb2.ModelReplication:
    problem = status.problem
    return replication_pb2.ModelReplication(
        model=status.goal.model,
        copies=status.goal.copies,
        data_workers=status.holders,
        copying=[
            replication_pb2.ReplicaCopy(
                data_worker=copy.target,
                from_data_worker=copy.source,
                phase=progress.phase,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
            )
            for copy, progress in status.copying.items()
        ],
        problem=problem.message if problem is not None else "",
        problem_error=type(problem).__name__ if problem is not None else "",
        waits_ms=math.ceil(status.waits_s * 1000),
    )
