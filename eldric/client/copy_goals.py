"""How many data workers should hold a model: the controller keeps that number up."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator

from eldric import errors
from eldric.client import types
from eldric.client.connections import Connections
from eldric.errors import EldricError, QueueIsFull, Unavailable, VersionMismatch
from eldric.v1 import replication_pb2, replication_pb2_grpc

#: How often the controller is asked how far copies are, in seconds.
_LOOK_S = 0.2
_CONTROLLER = "the controller"


class CopyGoals:
    """What the controller was told about copies of models."""

    def __init__(self, connections: Connections) -> None:
        self._connections, self._timeout_s = connections, connections.timeout_s

    async def all(self) -> defaultdict[str, replication_pb2.ModelReplication]:
        """By model, an empty one where nothing is set; also of a controller that knows of none."""
        found = defaultdict(replication_pb2.ModelReplication)
        with contextlib.suppress(VersionMismatch):
            for wanted in await self._list():
                found[wanted.model] = wanted
        return found

    async def set(self, model: str, copies: int) -> replication_pb2.ModelReplication:
        """Say how many data workers should hold a model; 0: no matter. Raises NotFound, InvalidRequest, AlreadyExists,
        VersionMismatch of a controller that cannot keep copies up."""
        stub = replication_pb2_grpc.ReplicationStub(await self._connections.controller())
        request = replication_pb2.SetReplicationRequest(model=model, copies=copies)
        with self._connections.calling(_CONTROLLER):
            return await stub.Set(request, timeout=self._timeout_s)

    async def drop(self, model: str) -> None:
        """No copies are made any more."""
        with contextlib.suppress(VersionMismatch):
            await self.set(model, 0)

    async def check_released(self, model: str) -> None:
        """Raises NotReady when a pipeline needs the model."""
        stub = replication_pb2_grpc.ReplicationStub(await self._connections.controller())
        with contextlib.suppress(VersionMismatch), self._connections.calling(_CONTROLLER):
            await stub.Release(replication_pb2.ReleaseRequest(model=model), timeout=self._timeout_s)

    async def reached_events(
        self, model: str, copies: int
    ) -> AsyncGenerator[types.ReplicaProgress | types.ModelReplicas, None]:
        """Set the number of copies, and follow the copies that it takes: progress, then who holds the model.

        Leaving early changes nothing: the controller goes on. Raises what `set` raises, and why a copy cannot be made
        now; the controller tries again.
        """
        status = await self.set(model, copies)
        while status.copies and len(status.data_workers) < status.copies:
            for copy in status.copying:
                yield types.ReplicaProgress(copy.data_worker, copy.phase, copy.done_bytes, copy.total_bytes)
            if status.problem and not status.copying:
                raise _problem(status)
            await asyncio.sleep(_LOOK_S)
            found = [each for each in await self._list() if each.model == model]
            if not found:
                raise Unavailable(f"{model} was removed, or its number of copies was set anew meanwhile")
            status = found[0]
        yield types.ModelReplicas(model, tuple(status.data_workers))

    async def _list(self) -> list[replication_pb2.ModelReplication]:
        stub = replication_pb2_grpc.ReplicationStub(await self._connections.controller())
        with self._connections.calling(_CONTROLLER):
            answer = await stub.List(replication_pb2.ListReplicationRequest(), timeout=self._timeout_s)
        return list(answer.models)


def _problem(status: replication_pb2.ModelReplication) -> EldricError:
    kind = getattr(errors, status.problem_error, None)
    if not (isinstance(kind, type) and issubclass(kind, EldricError)) or issubclass(kind, QueueIsFull):
        kind = Unavailable
    there = len(status.data_workers)
    return kind(f"{status.problem} ({there} of {status.copies} copies are there; it is tried again from time to time)")
