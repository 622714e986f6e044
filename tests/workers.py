"""Workers for tests of the controller: real nodes with a Stage service that computes nothing and does as it is told.

Usage, as a process of its own: python -m tests.workers FOLDER CONTROLLER NAME
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eldric.config import NodeConfig
from eldric.errors import AlreadyExists, EldricError, NotFound
from eldric.member import Member
from eldric.node import Node
from eldric.security import Authority, Identity
from eldric.v1 import common_pb2, heartbeat_pb2, registry_pb2, stage_pb2, stage_pb2_grpc

GIB = 1 << 30
#: A stage that so many answers in a row do not name is unloaded, as the contract says.
UNWANTED_ANSWERS = 3

Key = tuple[str, int, int]  # pipeline id, epoch, index


@dataclass
class Gate:
    """Stops a call on its way: `arrived` is set when one comes, and it goes on once `open` is set."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def passed(self) -> None:
        self.arrived.set()
        await self.open.wait()


class FakeWorker(stage_pb2_grpc.StageServicer):
    """One worker. Tests read what it was asked, hold its calls at gates, and make them fail."""

    def __init__(
        self,
        folder: Path,
        controller: str,
        name: str,
        *,
        memory_bytes: int = 16 * GIB,
        transports: Sequence[str] = ("zmq",),
        host: str = "",
    ) -> None:
        """The folder holds its identity."""
        self.name = name
        self.transports, self.host = transports, host
        self.unopened: dict[str, str] = {}  # schemes that it cannot open, and why
        self.unreachable: dict[str, str] = {}  # schemes by which it does not reach the next stage, and why
        self.busy = False  # a head that does not switch
        self.stages: dict[Key, stage_pb2.StageStatus] = {}
        self.beside: dict[Key, stage_pb2.StageStatus] = {}  # what they may go over to
        self.calls: list[tuple[str, object]] = []
        self.gates: dict[str, Gate] = {}
        self.failures: dict[str, EldricError] = {}
        self.degraded = asyncio.Event()
        self.closing = False
        self.reasons: list[str] = []  # that it was told, with whatever it was told
        self.unwanted: dict[Key, int] = {}
        self.memory_bytes = memory_bytes
        config = NodeConfig("worker", name, folder, http_port=0, grpc_port=0, controllers=(controller,), drain_s=1.0)
        self.node = Node(config, Identity.load(folder))
        descriptor = stage_pb2.DESCRIPTOR.services_by_name["Stage"]
        self.node.service(self, stage_pb2_grpc.add_StageServicer_to_server, descriptor)
        self.member = Member(self.node, self._resources, self._beat, self._answered)

    async def start(self) -> None:
        await self.node.start()
        await self.member.registered.wait()

    def called(self, method: str) -> list[object]:
        return [request for name, request in self.calls if name == method]

    def change(self, state: "stage_pb2.StageState.ValueType", message: str = "") -> None:
        """All its stages are in this state now, and the controller hears it at once."""
        for status in self.stages.values():
            status.state, status.message = state, message
        self.member.beat_now()

    def forget(self) -> None:
        """Its stages are gone, for whatever reason."""
        self.stages.clear()
        self.member.beat_now()

    async def Load(self, request: stage_pb2.LoadRequest, context: object) -> AsyncIterator[stage_pb2.LoadEvent]:
        self.calls.append(("Load", request))
        key = request.pipeline_id, request.epoch, request.index
        if key in self.stages:
            raise AlreadyExists(f"{self.name} holds stage {request.index}")
        status = stage_pb2.StageStatus(
            pipeline_id=request.pipeline_id,
            name=request.name,
            epoch=request.epoch,
            index=request.index,
            stage_count=request.stage_count,
            layers=request.layers,
            state=stage_pb2.LOADING,
        )
        self.stages[key] = status
        try:
            yield stage_pb2.LoadEvent(progress=stage_pb2.LoadProgress(phase="mapping", done_bytes=1, total_bytes=2))
            await self._arrive("Load")
            yield stage_pb2.LoadEvent(progress=stage_pb2.LoadProgress(phase="building"))
        except BaseException:
            self.stages.pop(key, None)
            raise
        status.state = stage_pb2.LOADED
        scheme = request.transport or "zmq"
        problem = self.unopened.get(scheme, "")
        status.endpoint.CopyFrom(_endpoint(self.name, request.index, "zmq" if problem else scheme))
        status.sender_scheme, status.sender_key = status.endpoint.scheme, status.endpoint.public_key
        status.memory.CopyFrom(common_pb2.MemoryUse(mapped_bytes=request.memory_limit_bytes // 2))
        loaded = stage_pb2.Loaded(endpoint=status.endpoint, memory=status.memory, transport_problem=problem)
        yield stage_pb2.LoadEvent(loaded=loaded)

    async def OpenLinks(self, request: stage_pb2.OpenLinksRequest, context: object) -> stage_pb2.OpenLinksResponse:
        self.calls.append(("OpenLinks", request))
        await self._arrive("OpenLinks")
        status = self._stage(request.pipeline_id, request.epoch, request.index)
        if request.beside:
            key = request.pipeline_id, request.epoch, request.index
            self.beside.pop(key, None)
            if request.receive and request.send:
                self.beside[key] = other = stage_pb2.StageStatus()
                other.CopyFrom(status)
                status = other
        if request.receive and request.receive not in self.unopened:
            status.endpoint.CopyFrom(_endpoint(self.name, request.index, request.receive))
        if request.send and request.send not in self.unopened:
            status.sender_scheme = request.send
            status.sender_key = _endpoint(self.name, request.index, request.send).public_key
        return stage_pb2.OpenLinksResponse(
            endpoint=status.endpoint,
            sender_scheme=status.sender_scheme,
            sender_key=status.sender_key,
            receive_problem=self.unopened.get(request.receive, ""),
            send_problem=self.unopened.get(request.send, ""),
        )

    async def Connect(self, request: stage_pb2.ConnectRequest, context: object) -> stage_pb2.ConnectResponse:
        self.calls.append(("Connect", request))
        await self._arrive("Connect")
        status = self._stage(request.pipeline_id, request.epoch, request.index)
        key = request.pipeline_id, request.epoch, request.index
        if request.phase == stage_pb2.BESIDE:
            return stage_pb2.ConnectResponse(
                problem=self.unreachable.get(self.beside.get(key, status).sender_scheme, "")
            )
        if request.phase == stage_pb2.SWITCH:
            if self.busy and request.index == 0:
                return stage_pb2.ConnectResponse(busy=True)
            if key in self.beside:
                status = self.stages[key] = self.beside.pop(key)
        if request.HasField("next") and (problem := self.unreachable.get(status.sender_scheme)):
            status.state, status.message, status.round = stage_pb2.BROKEN, problem, request.round
            return stage_pb2.ConnectResponse(problem=problem)
        if request.HasField("next"):
            status.link.CopyFrom(
                stage_pb2.LinkStatus(
                    to_stage=request.next_index,
                    transport=status.sender_scheme,
                    encryption="curve",
                    fallback=request.fallback,
                    frames=7,
                )
            )
        status.state, status.message, status.round = stage_pb2.SERVING, "", request.round
        self.member.beat_now()
        return stage_pb2.ConnectResponse()

    async def Unload(self, request: stage_pb2.UnloadRequest, context: object) -> stage_pb2.UnloadResponse:
        self.calls.append(("Unload", request))
        await self._arrive("Unload")
        gone = [
            (pipeline, epoch, index)
            for pipeline, epoch, index in self.stages
            if pipeline == request.pipeline_id
            and (not request.epoch or epoch <= request.epoch)
            and (not request.HasField("index") or index == request.index)
        ]
        for key in gone:
            del self.stages[key]
        self.member.beat_now()
        return stage_pb2.UnloadResponse(unloaded=len(gone))

    async def Status(self, request: stage_pb2.StageStatusRequest, context: object) -> stage_pb2.StageStatusResponse:
        await self._arrive("Status")
        held = [status for status in self.stages.values() if request.pipeline_id in ("", status.pipeline_id)]
        return stage_pb2.StageStatusResponse(stages=held)

    async def Trace(self, request: stage_pb2.TraceRequest, context: object) -> AsyncIterator[stage_pb2.StepTrace]:
        raise NotFound(f"{self.name} computes nothing")
        yield

    def _stage(self, pipeline_id: str, epoch: int, index: int) -> stage_pb2.StageStatus:
        status = self.stages.get((pipeline_id, epoch, index))
        if status is None:
            raise NotFound(f"{self.name} holds no stage {index}")
        return status

    async def _arrive(self, method: str) -> None:
        if method in self.gates:
            await self.gates[method].passed()
        if method in self.failures:
            raise self.failures[method]

    def _resources(self) -> registry_pb2.Resources:
        return registry_pb2.Resources(
            cores=1, memory_bytes=self.memory_bytes, transports=self.transports, host=self.host
        )

    def _beat(self) -> heartbeat_pb2.BeatRequest:
        used = sum(status.memory.mapped_bytes for status in self.stages.values())
        return heartbeat_pb2.BeatRequest(stages=self.stages.values(), memory_used_bytes=used)

    async def _answered(self, answer: heartbeat_pb2.BeatResponse) -> None:
        wanted = {(want.pipeline_id, want.epoch, want.index): want.degraded for want in answer.wanted}
        if any(wanted.values()):
            self.degraded.set()
        else:
            self.degraded.clear()
        self.closing = any(want.closing for want in answer.wanted)
        self.reasons += [want.reason for want in answer.wanted if want.reason]
        self.unwanted = {key: self.unwanted.get(key, 0) + 1 for key in self.stages if key not in wanted}
        for key, answers in self.unwanted.items():
            if answers >= UNWANTED_ANSWERS:
                self.stages.pop(key, None)


def _endpoint(name: str, index: int, scheme: str) -> common_pb2.TensorEndpoint:
    key = f"key-{name}-{index}" if scheme == "zmq" else f"{scheme}-key-{name}-{index}"
    return common_pb2.TensorEndpoint(scheme=scheme, address=f"{scheme}://{name}:{index}", public_key=key)


def issue(authority: Authority, folder: Path, kind: str, name: str) -> Path:
    """A node's folder, with its identity in it."""
    made = folder / name
    authority.issue_identity(kind, name).save(made)
    return made


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Returns once the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


async def _serve(folder: Path, controller: str, name: str) -> None:
    worker = FakeWorker(folder, controller, name)
    await worker.node.run()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
