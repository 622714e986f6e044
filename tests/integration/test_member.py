"""Registering and beating over real connections: restarts, silence and refusals of controllers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eldric import PROTOCOL
from eldric.channels import call_errors
from eldric.errors import NotFound, PermissionDenied, VersionMismatch
from eldric.member import Member
from eldric.names import split_address
from eldric.node import Node
from eldric.security import Authority
from eldric.v1 import heartbeat_pb2, heartbeat_pb2_grpc, registry_pb2, registry_pb2_grpc, stage_pb2
from tests.nodes import make_node, running

INTERVAL_MS, LEASE_MS = 50, 400


class Controller(registry_pb2_grpc.RegistryServicer, heartbeat_pb2_grpc.HeartbeatServicer):
    """Takes registrations and answers beats, unless it is told otherwise."""

    def __init__(self) -> None:
        self.registered: asyncio.Queue[registry_pb2.Node] = asyncio.Queue()
        self.deregistered: asyncio.Queue[str] = asyncio.Queue()
        self.beats: asyncio.Queue[heartbeat_pb2.BeatRequest] = asyncio.Queue()
        self.known: set[str] = set()
        self.silent = False
        self.protocol = PROTOCOL
        self.refusal: Exception | None = None

    async def Register(self, request: Any, context: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.known.add(request.node.id)
        self.registered.put_nowait(request.node)
        return registry_pb2.RegisterResponse(beat_interval_ms=INTERVAL_MS, lease_ms=LEASE_MS, protocol=self.protocol)

    async def Deregister(self, request: Any, context: Any) -> Any:
        self.known.discard(request.node_id)
        self.deregistered.put_nowait(request.node_id)
        return registry_pb2.DeregisterResponse()

    async def Beat(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for beat in requests:
            if beat.node_id not in self.known:
                raise NotFound("register first")
            self.beats.put_nowait(beat)
            if not self.silent:
                wanted = heartbeat_pb2.WantedStage(pipeline_id="p", epoch=beat.sequence)
                yield heartbeat_pb2.BeatResponse(sequence=beat.sequence, wanted=[wanted])


def controller_node(folder: Path, authority: Authority, address: str = "") -> tuple[Node, Controller]:
    """A controller, at `address` when one is given."""
    port = split_address(address)[1] if address else 0
    node, servicer = make_node(folder, authority, "controller", "c", grpc_port=port), Controller()  # type: ignore[abstract]
    registry = registry_pb2.DESCRIPTOR.services_by_name["Registry"]
    heartbeat = heartbeat_pb2.DESCRIPTOR.services_by_name["Heartbeat"]
    node.service(servicer, registry_pb2_grpc.add_RegistryServicer_to_server, registry)
    node.service(servicer, heartbeat_pb2_grpc.add_HeartbeatServicer_to_server, heartbeat)
    return node, servicer


def worker_node(folder: Path, authority: Authority, *controllers: str) -> Node:
    return make_node(folder, authority, "worker", "w1", controllers=controllers)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


async def soon(queue: "asyncio.Queue[Any]") -> Any:
    return await asyncio.wait_for(queue.get(), 10)


async def beat_with(controller: Controller, what: Any) -> heartbeat_pb2.BeatRequest:
    """The next beat for which `what` holds."""
    while True:
        beat = await soon(controller.beats)
        if what(beat):
            return beat  # type: ignore[no-any-return]


async def test_node_registers_beats_and_deregisters(tmp_path: Path, authority: Authority) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        stage = stage_pb2.StageStatus(pipeline_id="p", index=1)
        member = Member(
            worker,
            lambda: registry_pb2.Resources(cores=2),
            lambda: heartbeat_pb2.BeatRequest(stages=[stage], memory_used_bytes=7),
        )
        async with running(worker):
            known = await soon(controller.registered)
            assert (known.id, known.kind, known.resources.cores) == ("worker/w1", registry_pb2.WORKER, 2)
            assert (known.grpc_address, known.http_url) == (worker.grpc_address, worker.http_url)
            assert (known.protocol, known.incarnation) == (PROTOCOL, worker.incarnation)
            first, second = await soon(controller.beats), await soon(controller.beats)
            assert (first.sequence, second.sequence) == (1, 2)
            assert (first.node_id, first.incarnation) == ("worker/w1", worker.incarnation)
            assert (list(second.stages), second.memory_used_bytes, second.draining) == ([stage], 7, False)
            await asyncio.wait_for(member.registered.wait(), 10)
            assert member.controller == node.grpc_address
        assert await soon(controller.deregistered) == "worker/w1"
        assert not member.registered.is_set()


async def test_node_finds_a_restarted_controller(tmp_path: Path, authority: Authority) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    await node.start()
    worker = worker_node(tmp_path / "w", authority, node.grpc_address)
    member = Member(worker)
    async with running(worker):
        first = await soon(controller.registered)
        await soon(controller.beats)
        await node.stop()
        async with asyncio.timeout(10):
            while member.registered.is_set():
                await asyncio.sleep(0.01)
        again, controller = controller_node(tmp_path / "c", authority, node.grpc_address)
        async with running(again):
            known = await soon(controller.registered)
            assert (known.id, known.incarnation) == (first.id, first.incarnation)
            assert (await soon(controller.beats)).sequence > 1
            await asyncio.wait_for(member.registered.wait(), 10)


async def test_node_waits_for_its_first_controller(tmp_path: Path, authority: Authority) -> None:
    node, _ = controller_node(tmp_path / "c", authority)
    async with running(node):
        pass
    worker = worker_node(tmp_path / "w", authority, node.grpc_address)
    member = Member(worker)
    async with running(worker):
        assert not member.registered.is_set()
        late, controller = controller_node(tmp_path / "c", authority, node.grpc_address)
        async with running(late):
            await soon(controller.registered)


async def test_node_turns_to_the_next_controller(tmp_path: Path, authority: Authority) -> None:
    one, first = controller_node(tmp_path / "1", authority)
    two, second = controller_node(tmp_path / "2", authority)
    async with running(two):
        await one.start()
        worker = worker_node(tmp_path / "w", authority, one.grpc_address, two.grpc_address)
        member = Member(worker)
        async with running(worker):
            await soon(first.beats)
            assert second.registered.empty()
            await one.stop()
            await soon(second.beats)
            assert member.controller == two.grpc_address


async def test_silent_controller_is_left_after_a_lease(tmp_path: Path, authority: Authority) -> None:
    one, first = controller_node(tmp_path / "1", authority)
    two, second = controller_node(tmp_path / "2", authority)
    first.silent = True
    async with running(one), running(two):
        worker = worker_node(tmp_path / "w", authority, one.grpc_address, two.grpc_address)
        member = Member(worker)
        async with running(worker):
            await soon(first.beats)
            assert not member.registered.is_set()  # nobody answered yet
            await soon(second.beats)


async def test_controller_that_forgot_gets_a_new_registration_at_once(tmp_path: Path, authority: Authority) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        member = Member(worker)
        async with running(worker):
            await soon(controller.registered)
            await asyncio.wait_for(member.registered.wait(), 10)
            controller.known.clear()
            await soon(controller.registered)
            assert (await soon(controller.beats)).node_id == "worker/w1"


async def test_beats_go_on_while_an_answer_is_worked_on(tmp_path: Path, authority: Authority) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    begun, release = asyncio.Event(), asyncio.Event()
    seen: list[int] = []

    async def work(answer: heartbeat_pb2.BeatResponse) -> None:
        seen.append(answer.sequence)
        begun.set()
        if len(seen) == 1:
            await release.wait()
            raise ValueError("not a reason to stop")

    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        Member(worker, on_answer=work)
        async with running(worker):
            await asyncio.wait_for(begun.wait(), 10)
            await beat_with(controller, lambda beat: beat.sequence >= 12)
            begun.clear()
            release.set()
            await asyncio.wait_for(begun.wait(), 10)
    assert seen[0] == 1
    assert seen[1] >= 10  # the newest answer, not the one after the first


async def test_change_is_told_at_once_and_draining_too(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.integration.test_member.INTERVAL_MS", 60_000)
    monkeypatch.setattr("tests.integration.test_member.LEASE_MS", 120_000)
    node, controller = controller_node(tmp_path / "c", authority)
    used = 1
    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        member = Member(worker, beat=lambda: heartbeat_pb2.BeatRequest(memory_used_bytes=used))
        draining = asyncio.Event()
        worker.on_drain(draining.wait)  # type: ignore[arg-type]
        await worker.start()
        assert (await soon(controller.beats)).memory_used_bytes == 1
        used = 2
        member.beat_now()
        assert (await soon(controller.beats)).memory_used_bytes == 2
        stopping = asyncio.create_task(worker.stop())
        assert (await soon(controller.beats)).draining
        draining.set()
        await stopping
        assert await soon(controller.deregistered) == "worker/w1"


async def test_state_that_cannot_be_told_is_not_told(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    broken = False

    def beat() -> heartbeat_pb2.BeatRequest:
        if broken:
            raise ValueError("no")
        return heartbeat_pb2.BeatRequest(memory_used_bytes=7)

    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        Member(worker, beat=beat)
        async with running(worker):
            await soon(controller.beats)
            broken = True
            async with asyncio.timeout(10):
                while "event=beat_failed" not in caplog.text:
                    await asyncio.sleep(0.01)
            broken = False
            while not controller.beats.empty():
                assert controller.beats.get_nowait().memory_used_bytes == 7
            assert (await soon(controller.beats)).memory_used_bytes == 7


@pytest.mark.parametrize(
    ("refusal", "protocol", "words"),
    [
        (VersionMismatch("protocol 1 is not spoken here, 2 is"), PROTOCOL, "protocol 1 is not spoken here"),
        (PermissionDenied("no"), PROTOCOL, "'no'"),
        (None, PROTOCOL + 1, f"this node speaks protocol {PROTOCOL}, the controller {PROTOCOL + 1}"),
    ],
)
async def test_refusal_is_told_and_not_tried_again_at_once(
    tmp_path: Path,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    refusal: Exception | None,
    protocol: int,
    words: str,
) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    controller.refusal, controller.protocol = refusal, protocol
    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        member = Member(worker)
        async with running(worker):
            async with asyncio.timeout(10):
                while words not in caplog.text:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert caplog.text.count("event=controller_lost") == 1
            assert not member.registered.is_set()


async def test_node_may_not_speak_for_another(tmp_path: Path, authority: Authority) -> None:
    node, controller = controller_node(tmp_path / "c", authority)
    async with running(node):
        worker = worker_node(tmp_path / "w", authority, node.grpc_address)
        for request in (
            registry_pb2.RegisterRequest(node=registry_pb2.Node(id="worker/w2")),
            registry_pb2.RegisterRequest(),
        ):
            with pytest.raises(PermissionDenied, match="may not speak for"):
                await register(worker, node.grpc_address, request)
        controller.known.add("worker/w2")
        with pytest.raises(PermissionDenied, match="may not speak for worker/w2"):
            await beat_as(worker, node.grpc_address, "worker/w2")
        assert controller.registered.empty()
        assert controller.beats.empty()
        await worker.channels.close()


async def register(node: Node, address: str, request: registry_pb2.RegisterRequest) -> None:
    with call_errors():
        await registry_pb2_grpc.RegistryStub(node.channels.to(address, "controller")).Register(request)


async def beat_as(node: Node, address: str, node_id: str) -> None:
    stub = heartbeat_pb2_grpc.HeartbeatStub(node.channels.to(address, "controller"))
    call = stub.Beat(iter([heartbeat_pb2.BeatRequest(node_id=node_id)]))
    with call_errors():
        await call.read()
