"""Every method and route of every node, called with every kind of certificate."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import MethodDescriptor
from starlette.routing import Route

from eldric import PROTOCOL
from eldric.channels import channel
from eldric.config import NodeConfig
from eldric.names import IDENTITY_KINDS
from eldric.node import Node
from eldric.rest import bindings_of
from eldric.router.config import RouterConfig
from eldric.router.main import Router
from eldric.security import Authority, Identity
from eldric.v1 import heartbeat_pb2, registry_pb2
from eldric.v1.heartbeat_pb2_grpc import HeartbeatStub
from eldric.v1.registry_pb2_grpc import RegistryStub
from eldric.web_app import make_app
from eldric.worker.config import WorkerConfig
from eldric.worker.main import Worker
from tests.access import DECISIONS, OPEN_ROUTES, ROUTES_LIKE, STRANGERS, methods
from tests.controllers import World, controller_here
from tests.edges import edge_here
from tests.workers import issue

#: A call that is neither refused nor over by then was let in.
LET_IN_S = 5.0


@dataclass
class Cluster:
    """A node of each kind, and a certificate of each."""

    authority: Authority
    nodes: dict[str, Node]
    identities: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = {kind: self.authority.issue_identity(kind, "x1") for kind in IDENTITY_KINDS}


@contextlib.asynccontextmanager
async def started(node: Node) -> AsyncIterator[Node]:
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


def settings(world: World, kind: str) -> NodeConfig:
    name = f"{kind}-1"
    home = issue(world.authority, world.folder, kind, name)
    return NodeConfig(kind, name, home, http_port=0, grpc_port=0, controllers=(world.address,), drain_s=1.0)


@contextlib.asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    async with controller_here(folder) as (world, controller), contextlib.AsyncExitStack() as stack:
        worker = Worker(WorkerConfig(settings(world, "worker"), memory_bytes=1 << 30, threads=1))
        router = Router(RouterConfig(settings(world, "router")))
        store = await world.add_empty_store()
        edge = await stack.enter_async_context(edge_here(world.authority, folder, world.address))
        for node in (worker.node, router.node):
            await stack.enter_async_context(started(node))
        nodes = (controller.node, worker.node, store.node, router.node, edge.node)
        yield Cluster(world.authority, {node.config.kind: node for node in nodes})


async def refused(connection: grpc.aio.Channel, method: MethodDescriptor) -> bool | None:
    """Whether an empty call is not let in; None where nobody serves the method."""
    arity = "_".join("stream" if each else "unary" for each in (method.client_streaming, method.server_streaming))
    call = getattr(connection, arity)(f"/{method.containing_service.full_name}/{method.name}")
    made = call(iter([b""]) if method.client_streaming else b"", timeout=LET_IN_S)
    try:
        if method.server_streaming:
            await made.read()
        else:
            await made
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return None
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return "may not call" in str(error.details())
        return error.code() is grpc.StatusCode.UNAUTHENTICATED and "needs a certificate" in str(error.details())
    finally:
        made.cancel()
    return False


async def verdicts(node: Node, connection: grpc.aio.Channel) -> dict[str, bool]:
    """Of each method of the node's that is served there: whether it was refused."""
    found = [method for service in node._services for method in service.descriptor.methods]
    answers = await asyncio.gather(*(refused(connection, method) for method in found))
    named = {f"{each.containing_service.name}/{each.name}": answer for each, answer in zip(found, answers, strict=True)}
    return {method: answer for method, answer in named.items() if answer is not None}


async def test_every_method_lets_in_those_who_may_call_it_and_nobody_else(tmp_path: Path) -> None:
    served: set[str] = set()
    async with cluster(tmp_path) as made:

        async def call_all(node: Node, kind: str, identity: Identity) -> None:
            async with channel(node.grpc_address, identity, node.config.kind) as connection:
                found = await verdicts(node, connection)
            served.update(found)
            expected = {method: kind != "client" and kind not in DECISIONS[method] for method in found}
            assert found == expected, f"{kind} at a {node.config.kind}"

        for node in made.nodes.values():
            await asyncio.gather(*(call_all(node, kind, identity) for kind, identity in made.identities.items()))
    assert served == set(DECISIONS) == set(methods())


async def test_a_stranger_may_join_and_nothing_else(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        credentials = grpc.ssl_channel_credentials(made.authority.certificate_pem)
        controller = made.nodes["controller"]
        options = [("grpc.ssl_target_name_override", "controller.eldric")]
        for address in (node.join_address for node in made.nodes.values() if node.join_address):
            async with grpc.aio.secure_channel(address, credentials, options) as connection:
                found = await verdicts(controller, connection)
            assert {method for method, is_refused in found.items() if not is_refused} == STRANGERS
        for kind, node in made.nodes.items():
            options = [("grpc.ssl_target_name_override", f"{kind}.eldric")]
            async with grpc.aio.secure_channel(node.grpc_address, credentials, options) as connection:
                check: Any = connection.unary_unary("/grpc.health.v1.Health/Check")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await check(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def routes_of(node: Node) -> Sequence[Route]:
    app = make_app(node.config, node.metrics, node._guard, node._readiness, node._services, node._routes)
    return [route for route in app.routes if isinstance(route, Route)]


def decision_of(node: Node, route: Route, verb: str) -> str:
    """The method whose callers may ask a route; empty: whoever has a connection."""
    if route.path in OPEN_ROUTES or (node.config.kind == "router" and route in node._routes):
        return ""
    if route.path in ROUTES_LIKE:
        return ROUTES_LIKE[route.path]
    for binding in (each for service in node._services for each in bindings_of(service.descriptor)):
        if (binding.verb, binding.path) == (verb, route.path):
            return f"{binding.method.containing_service.name}/{binding.method.name}"
    raise AssertionError(f"nobody decided who may {verb} {route.path}: see tests/access.py")


async def is_let_in(client: httpx.AsyncClient, verb: str, path: str) -> bool | None:
    """None: nobody answers. A request that names no node is let in, and then refused for speaking of nobody."""
    content: dict[str, Any] = {"content": "{}"} if verb == "POST" else {}
    try:
        async with client.stream(verb, path.replace("{", "x").replace("}", "x"), **content) as response:
            if response.status_code == 403:
                return "may not speak for" in (await response.aread()).decode()
            return response.status_code != 401
    except httpx.TransportError:
        return None


async def test_every_route_lets_in_those_who_may_ask_and_nobody_else(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        for node in made.nodes.values():
            asked = [(route, verb) for route in routes_of(node) for verb in (route.methods or {"GET"}) - {"HEAD"}]
            for kind, identity in [*made.identities.items(), ("", None)]:
                stranger = ssl.create_default_context(cadata=made.authority.certificate_pem.decode())
                tls = identity.client_context() if identity is not None else stranger
                async with httpx.AsyncClient(verify=tls, base_url=node.http_url, trust_env=False, timeout=10) as client:
                    for route, verb in asked:
                        method = decision_of(node, route, verb)
                        allowed = not method or kind == "client" or kind in DECISIONS[method]
                        found = await is_let_in(client, verb, route.path)
                        where = f"{kind or 'stranger'} at a {node.config.kind}: {verb} {route.path}"
                        if node.http_url.startswith("https"):
                            assert found == (allowed if kind else None), where
                        else:  # plain HTTP knows no caller
                            assert found == (not method), where


async def test_no_node_speaks_as_another(tmp_path: Path) -> None:
    """A worker's certificate is good for one name, of one kind."""
    async with controller_here(tmp_path) as (world, _):
        await world.add_workers("w2")
        thief = world.authority.issue_identity("worker", "w1")
        async with channel(world.address, thief, "controller") as connection:
            registry: Any = RegistryStub(connection)
            heartbeat: Any = HeartbeatStub(connection)
            for kind, name in (("WORKER", "w2"), ("DATA", "w1"), ("CONTROLLER", "main"), ("WORKER", "W1")):
                node_id = f"{kind.lower()}/{name}"
                node = registry_pb2.Node(
                    id=node_id,
                    name=name,
                    kind=registry_pb2.NodeKind.Value(kind),
                    grpc_address="127.0.0.1:1",
                    protocol=PROTOCOL,
                    incarnation=7,
                )
                beat = heartbeat_pb2.BeatRequest(node_id=node_id, incarnation=7, draining=True)
                for call in (
                    registry.Register(registry_pb2.RegisterRequest(node=node)),
                    registry.Deregister(registry_pb2.DeregisterRequest(node_id=node_id)),
                    heartbeat.Beat(iter([beat])).read(),
                ):
                    with pytest.raises(grpc.aio.AioRpcError, match="may not speak for") as caught:
                        await call
                    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            posed = registry_pb2.Node(
                id="worker/w1",
                name="w1",
                kind=registry_pb2.DATA,
                grpc_address="127.0.0.1:1",
                protocol=PROTOCOL,
                incarnation=7,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry.Register(registry_pb2.RegisterRequest(node=posed))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await world.calls.nodes() == {"w2": "UP"}
