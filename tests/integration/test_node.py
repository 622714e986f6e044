"""A node's servers on real sockets: errors, deadlines, health, REST, ports, draining, ending."""

import asyncio
import errno
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from eldric import channels, errors
from eldric.channels import call_errors, channel, sync_channel
from eldric.config import NodeConfig
from eldric.errors import (
    AddressInUse,
    AlreadyExists,
    DeadlineExceeded,
    EldricError,
    InvalidRequest,
    NotEnoughMemory,
    QueueIsFull,
    Unavailable,
)
from eldric.node_file import is_running
from eldric.security import (
    Authority,
    Identity,
)
from eldric.v1 import pipeline_pb2, pipeline_pb2_grpc
from tests.nodes import http, make_node, running, serve_members, serve_pipelines, status


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


@pytest.fixture(scope="module")
def admin(authority: Authority) -> Identity:
    return authority.issue_identity("client", "admin")


ERRORS = [
    errors.InvalidRequest("x"),
    errors.NotFound("grün"),
    errors.AlreadyExists("x"),
    errors.AddressInUse("x"),
    errors.NotEnoughMemory("x"),
    errors.NotReady("x"),
    errors.StaleEpoch("x"),
    errors.VersionMismatch("x"),
    errors.Unavailable("x"),
    errors.PipelineDegraded("x"),
    errors.DataLoss("x"),
    errors.Unauthenticated("x"),
    errors.PermissionDenied("x"),
    errors.DeadlineExceeded("x"),
]


async def test_errors_come_back_as_what_they_were(tmp_path: Path, authority: Authority, admin: Identity) -> None:
    node = make_node(tmp_path, authority)
    pipelines = serve_pipelines(node)
    async with running(node), channel(node.grpc_address, admin, "controller") as connection:
        for error in ERRORS:
            pipelines.error = error
            with pytest.raises(EldricError) as caught:
                await status(connection)
            assert type(caught.value) is type(error)
            assert caught.value.message == error.message
        pipelines.error = QueueIsFull("full", 2.5)
        with pytest.raises(QueueIsFull, match="full") as full:
            await status(connection)
        assert full.value.retry_after_s == 2.5
        pipelines.error = InvalidRequest("long " * 10_000)
        with pytest.raises(InvalidRequest, match=r"^long long.*…$"):
            await status(connection)


async def test_unexpected_error_tells_its_incident_alone(
    tmp_path: Path, authority: Authority, admin: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node).error = ValueError("a secret")
    async with running(node), channel(node.grpc_address, admin, "controller") as connection:
        with pytest.raises(EldricError, match="internal error; incident") as caught:
            await status(connection)
    assert type(caught.value) is EldricError
    assert "secret" not in caught.value.message
    assert caught.value.message.split()[3] in caplog.text


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), "no memory is left"),
        (OSError(errno.EMFILE, "Too many open files", "/a/secret"), "Too many open files"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
    ],
)
async def test_a_node_that_lacks_a_resource_says_which(
    tmp_path: Path, authority: Authority, admin: Identity, error: Exception, lacking: str
) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node).error = error
    async with running(node), channel(node.grpc_address, admin, "controller") as connection:
        with pytest.raises(NotEnoughMemory, match=f"this node lacks a resource: {lacking}; incident") as caught:
            await status(connection)
    assert "secret" not in caught.value.message


async def test_calls_to_nobody_say_whom_they_miss(admin: Identity) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with channel(f"127.0.0.1:{unused.getsockname()[1]}", admin, "controller") as connection:
            with pytest.raises(Unavailable, match=r"the controller cannot be reached .*refused"):
                await status(connection)


async def test_unary_calls_have_a_deadline(
    tmp_path: Path, authority: Authority, admin: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eldric.channels.DEFAULT_TIMEOUT_S", 0.2)
    node = make_node(tmp_path, authority)
    pipelines = serve_pipelines(node)

    def ask() -> None:
        with sync_channel(node.grpc_address, admin, "controller") as connection, call_errors("the controller"):
            pipeline_pb2_grpc.PipelineStub(connection).List(pipeline_pb2.ListPipelinesRequest())

    async with running(node):
        async with channel(node.grpc_address, admin, "controller") as connection:
            with pytest.raises(DeadlineExceeded, match="did not answer"), call_errors("the controller"):
                await pipeline_pb2_grpc.PipelineStub(connection).List(pipeline_pb2.ListPipelinesRequest())
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(ask)
        pipelines.release.set()
        await asyncio.to_thread(ask)


async def test_large_messages_pass(tmp_path: Path, authority: Authority, admin: Identity) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    async with running(node), channel(node.grpc_address, admin, "controller") as connection:
        assert len((await status(connection, 20_000_000)).message) == 20_000_000


async def test_health_and_reflection_are_served(tmp_path: Path, authority: Authority, admin: Identity) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    ready = True
    node.health(lambda: (ready, {}))
    serving = health_pb2.HealthCheckResponse
    async with running(node), channel(node.grpc_address, admin, "controller") as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == serving.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == serving.SERVING
        ready = False
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == serving.NOT_SERVING
        assert (await watch.read()).status == serving.NOT_SERVING
        watch.cancel()
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        listing = reflection_pb2_grpc.ServerReflectionStub(connection).ServerReflectionInfo(iter([request]))
        answer = await listing.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"eldric.v1.Pipeline", "grpc.health.v1.Health"} <= names


async def test_client_that_leaves_an_event_stream_cancels_the_call(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    node = make_node(tmp_path, authority)
    pipelines = serve_pipelines(node)
    async with running(node), http(node, admin) as client:
        async with client.stream("POST", "/api/v1/pipeline/deploy", json={"model": "m"}) as answer:
            line = await anext(answer.aiter_lines())
            assert json.loads(line.removeprefix("data: "))["stage"]["worker"] == "w1"
        await asyncio.wait_for(pipelines.ended.wait(), 5)


async def test_clients_that_leave_busy_streams_leave_nothing_behind(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node).busy = True
    async with running(node), http(node, admin) as client, channel(node.grpc_address, admin, "controller") as link:

        async def leave_events() -> None:
            async with client.stream("POST", "/api/v1/pipeline/deploy", json={"model": "m"}) as answer:
                lines = answer.aiter_lines()
                for _ in range(3):
                    await anext(lines)

        async def leave_call() -> None:
            call = pipeline_pb2_grpc.PipelineStub(link).Deploy(pipeline_pb2.DeployRequest())
            await call.read()
            call.cancel()

        await leave_call()
        before = len(asyncio.all_tasks())
        await asyncio.gather(*(leave() for leave in (leave_events, leave_call) for _ in range(20)))
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)


async def test_node_file_says_where_the_node_is(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_members(node, authority)
    assert not is_running(tmp_path)
    async with running(node):
        content = json.loads((tmp_path / "node.json").read_text())
        assert content["grpc_address"] == node.grpc_address
        assert content["http_url"] == node.http_url
        assert content["join_address"] == node.join_address
        assert (content["kind"], content["name"], content["incarnation"]) == ("controller", "n1", node.incarnation)
        assert is_running(tmp_path)
    assert not (tmp_path / "node.json").exists()
    assert not is_running(tmp_path)


async def test_second_node_in_a_folder_is_refused(tmp_path: Path, authority: Authority) -> None:
    async with running(make_node(tmp_path, authority)):
        with pytest.raises(AlreadyExists, match=r"a node \(process \d+\) runs in"):
            await make_node(tmp_path, authority).start()
        assert (tmp_path / "node.json").exists()


@pytest.mark.parametrize("setting", ["http_port", "grpc_port", "join_port"])
async def test_port_in_use_is_one_clear_error(tmp_path: Path, authority: Authority, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings: dict[str, Any] = {setting: port}
        node = make_node(tmp_path, authority, **settings)
        serve_members(node, authority)
        option = "--" + setting.replace("_", "-")
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} is in use .* {option}"):
            await node.start()
    assert not (tmp_path / "node.json").exists()
    assert len(asyncio.all_tasks()) == 1
    async with running(make_node(tmp_path, authority)):  # the folder and the other ports are free again
        pass


async def test_two_nodes_never_share_a_port(tmp_path: Path, authority: Authority) -> None:
    async with running(make_node(tmp_path / "a", authority)) as first:
        for setting, address in (("http_port", first.http_url), ("grpc_port", first.grpc_address)):
            settings: dict[str, Any] = {setting: int(address.rpartition(":")[2])}
            second = make_node(tmp_path / "b", authority, **settings)
            with pytest.raises(AddressInUse):
                await second.start()


async def test_address_of_another_machine_is_a_clear_error(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot listen on 192\.0\.2\.1:0"):
        await make_node(tmp_path, authority, host="192.0.2.1").start()


@pytest.mark.parametrize(
    "settings",
    [{"kind": "boss"}, {"name": "a b"}, {"http_port": 65536}, {"grpc_port": -2}, {"kind": "worker"}, {"drain_s": -1}],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        NodeConfig(**{"kind": "controller", "name": "c", "folder": tmp_path, **settings})


def test_ports_follow_the_kind(tmp_path: Path) -> None:
    worker = NodeConfig("worker", "w", tmp_path, controllers=("127.0.0.1:9880",))
    assert (worker.http_port, worker.grpc_port) == (8890, 9890)
    edge = NodeConfig("edge", "e", tmp_path, controllers=("[::1]:9880",))
    assert (edge.http_port, edge.grpc_port) == (443, 1443)
    controller = NodeConfig("controller", "c", tmp_path, http_port=0)
    assert (controller.grpc_port, controller.join_port) == (0, 0)


async def test_drain_lets_calls_end_and_is_not_held_by_watchers(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    node = make_node(tmp_path, authority, drain_s=20.0)
    pipelines = serve_pipelines(node)
    order: list[str] = []

    async def note(word: str) -> None:
        order.append(word)

    node.on_drain(lambda: note("drain 1"))
    node.on_drain(lambda: note("drain 2"))
    node.on_stop(lambda: note("stop 1"))
    node.on_stop(lambda: note("stop 2"))
    await node.start()
    async with channel(node.grpc_address, admin, "controller") as connection:
        stub = pipeline_pb2_grpc.PipelineStub(connection)
        watch = stub.Watch(pipeline_pb2.WatchPipelinesRequest())
        await watch.read()
        deploy = stub.Deploy(pipeline_pb2.DeployRequest(model="m"))
        await deploy.read()
        stopping = asyncio.create_task(node.stop())
        while not order:
            await asyncio.sleep(0.01)
        assert (await status(connection)).id == "client/admin"  # the servers still answer
        assert node.draining
        pipelines.release.set()
        last = await deploy.read()
        assert isinstance(last, pipeline_pb2.DeployEvent)
        assert last.ready.name == "m"
        await asyncio.wait_for(stopping, 5)
        with pytest.raises((grpc.RpcError, asyncio.CancelledError)):
            await watch.read()
    assert order == ["drain 1", "drain 2", "stop 2", "stop 1"]
    assert len(asyncio.all_tasks()) == 1


async def test_drain_lets_a_request_of_a_route_by_hand_end(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    node = make_node(tmp_path, authority, drain_s=20.0)
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Response:
        begun.set()
        await release.wait()
        return PlainTextResponse("done")

    node.routes([Route("/slow", slow)])
    await node.start()
    async with http(node, admin) as client:
        asked = asyncio.create_task(client.get("/slow"))
        await asyncio.wait_for(begun.wait(), 10)
        stopping = asyncio.create_task(node.stop())
        done, _ = await asyncio.wait({stopping}, timeout=0.5)
        assert not done
        release.set()
        assert (await asked).text == "done"
        await asyncio.wait_for(stopping, 10)


async def test_drain_is_bounded(tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    node = make_node(tmp_path, authority, drain_s=0.2)
    node.on_drain(asyncio.Event().wait)  # type: ignore[arg-type]

    async def broken() -> None:
        raise ValueError("no")

    node.on_drain(broken)
    await node.start()
    await asyncio.wait_for(node.stop(), 5)
    assert "event=drain_timeout" in caplog.text
    assert "event=drain_failed" in caplog.text


async def start_process(folder: Path, authority: Authority, drain_s: float) -> tuple[asyncio.subprocess.Process, Any]:
    """A controller process, and its node.json."""
    authority.save(folder / "authority")
    command = [sys.executable, "-m", "tests.nodes", str(folder), str(drain_s)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    await appears(folder / "node.json")
    return process, json.loads((folder / "node.json").read_text())


async def appears(path: Path) -> None:
    async with asyncio.timeout(20):
        while not path.exists():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("how", ["terminate", "interrupt"])
async def test_signal_drains_and_leaves_nothing_behind(tmp_path: Path, authority: Authority, how: str) -> None:
    process, content = await start_process(tmp_path, authority, 0.0)
    assert content["pid"] == process.pid
    process.send_signal(signal.SIGTERM if how == "terminate" else signal.SIGINT)
    _, errors_told = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0, errors_told.decode()
    assert not (tmp_path / "node.json").exists()
    assert not is_running(tmp_path)
    with (
        pytest.raises(ConnectionRefusedError),
        socket.create_connection(("127.0.0.1", int(content["grpc_address"][10:]))),
    ):
        pass


async def test_second_signal_ends_at_once(tmp_path: Path, authority: Authority) -> None:
    process, _ = await start_process(tmp_path, authority, 50.0)
    process.terminate()
    await appears(tmp_path / "draining")
    assert (tmp_path / "node.json").exists()
    process.terminate()
    await asyncio.wait_for(process.communicate(), 5)
    assert process.returncode == 128 + 15
    assert not (tmp_path / "node.json").exists()


async def test_a_call_to_a_node_that_stands_still_ends(
    tmp_path: Path, authority: Authority, admin: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel goes on acknowledging what is sent to it. The times are those of use, divided by twenty."""
    sooner = [(name, value // 20 if name.endswith("_ms") else value) for name, value in channels.OPTIONS]
    monkeypatch.setattr(channels, "OPTIONS", sooner)
    process, content = await start_process(tmp_path, authority, 0.0)
    try:
        async with channel(content["grpc_address"], admin, "controller") as connection:
            call = health_pb2_grpc.HealthStub(connection).Watch(health_pb2.HealthCheckRequest())
            await call.read()
            process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable, match="ping timeout"), call_errors("controller/n1"):
                    await call.read()
    finally:
        process.kill()
        await process.communicate()


async def test_folder_of_a_killed_node_can_be_used_again(tmp_path: Path, authority: Authority) -> None:
    process, _ = await start_process(tmp_path, authority, 0.0)
    process.kill()
    await process.communicate()
    assert (tmp_path / "node.json").exists()
    assert not is_running(tmp_path)
    async with running(make_node(tmp_path, authority)):
        assert is_running(tmp_path)
