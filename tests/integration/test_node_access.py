"""Who may talk to a node: mutual TLS, joining with a token, renewing certificates."""

import asyncio
import datetime
import socket
import ssl
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eldric.channels import ChannelPool, call_errors, channel
from eldric.config import NodeConfig
from eldric.errors import (
    EldricError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from eldric.node import Node
from eldric.security import (
    Authority,
    Identity,
    fetch_authority,
    join,
    new_token,
    renew,
)
from eldric.v1 import membership_pb2, membership_pb2_grpc, pipeline_pb2, pipeline_pb2_grpc
from tests.nodes import STATUS, http, make_node, running, serve_members, serve_pipelines, status


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


@pytest.fixture(scope="module")
def admin(authority: Authority) -> Identity:
    return authority.issue_identity("client", "admin")


async def test_call_over_mutual_tls_knows_its_caller(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    worker = authority.issue_identity("worker", "w1")
    async with running(node), channel(node.grpc_address, worker, "controller", "n1") as connection:
        assert (await status(connection)).id == "worker/w1"


async def test_servers_of_another_kind_or_name_are_refused(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    async with running(node):
        for kind, name in (("worker", None), ("controller", "n2")):
            async with channel(node.grpc_address, admin, kind, name) as connection:
                with pytest.raises(Unavailable, match="cannot be reached"):
                    await status(connection)


async def test_callers_of_another_cluster_and_without_certificate_are_refused(
    tmp_path: Path, authority: Authority
) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    foreign = Authority.create("demo").issue_identity("client", "admin")
    mixed = Identity("client", "admin", authority.certificate_pem, foreign.certificate_pem, foreign.key_pem)
    async with running(node):
        async with channel(node.grpc_address, mixed, "controller") as connection:
            with pytest.raises(Unavailable):
                await status(connection)
        credentials = grpc.ssl_channel_credentials(authority.certificate_pem)
        options = [("grpc.ssl_target_name_override", "controller.eldric")]
        async with grpc.aio.secure_channel(node.grpc_address, credentials, options) as connection:
            with pytest.raises(Unavailable):
                await status(connection)


async def test_callers_of_the_wrong_kind_are_refused(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    worker = authority.issue_identity("worker", "w1")
    async with running(node), channel(node.grpc_address, worker, "controller") as connection:
        with pytest.raises(PermissionDenied, match="worker/w1 may not call"), call_errors():
            async for _ in pipeline_pb2_grpc.PipelineStub(connection).Deploy(pipeline_pb2.DeployRequest()):
                pass


async def test_stranger_joins_with_a_token_and_renews_with_its_certificate(
    tmp_path: Path, authority: Authority
) -> None:
    node = make_node(tmp_path, authority)
    members, _ = serve_members(node, authority), serve_pipelines(node)
    token, members.record = new_token(authority.sha256, now=0.0)
    async with running(node):
        identity = await join(node.join_address, token, "worker", "w9")
        assert (identity.node_id, identity.authority_pem) == ("worker/w9", authority.certificate_pem)
        with pytest.raises(Unauthenticated, match="used up"):
            await join(node.join_address, token, "worker", "w10")
        fresh = await renew(node.grpc_address, identity)
        assert fresh.node_id == identity.node_id
        assert fresh.key_pem != identity.key_pem
        async with channel(node.grpc_address, fresh, "controller") as connection:
            assert (await status(connection)).id == "worker/w9"


async def test_joiner_sends_nothing_to_another_cluster(tmp_path: Path, authority: Authority) -> None:
    impostor = Authority.create("demo")
    node = make_node(tmp_path, impostor)
    members = serve_members(node, impostor)
    token, members.record = new_token(authority.sha256, now=0.0)
    async with running(node):
        with pytest.raises(Unauthenticated, match="another cluster"):
            await join(node.join_address, token, "worker", "w9")
        assert await fetch_authority(node.join_address, impostor.sha256) == impostor.certificate_pem
    assert members.record is not None
    assert members.record.uses_left == 1
    with pytest.raises(Unavailable, match="cannot be reached"):
        await fetch_authority(node.join_address, impostor.sha256)


async def test_strangers_may_only_join(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_members(node, authority)
    credentials = grpc.ssl_channel_credentials(authority.certificate_pem)
    options = [("grpc.ssl_target_name_override", "controller.eldric")]
    async with running(node), grpc.aio.secure_channel(node.join_address, credentials, options) as connection:
        stub = membership_pb2_grpc.MembershipStub(connection)
        with pytest.raises(Unauthenticated, match="certificate"), call_errors():
            await stub.CreateToken(membership_pb2.CreateTokenRequest())
        with pytest.raises(Unauthenticated, match="certificate"), call_errors():
            await stub.Renew(membership_pb2.RenewRequest())
        with pytest.raises(Unauthenticated, match="unknown join token"), call_errors():
            await stub.Join(membership_pb2.JoinRequest())
        with pytest.raises(EldricError), call_errors():
            await pipeline_pb2_grpc.PipelineStub(connection).Status(STATUS())


async def test_rest_over_mutual_tls_knows_its_caller(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    worker = authority.issue_identity("worker", "w1")
    async with running(node), http(node, worker) as client:
        answer = await client.get("/api/v1/pipeline/status")
        assert answer.json()["pipelines"][0]["id"] == "worker/w1"
        assert (await client.post("/api/v1/pipeline/deploy", json={})).status_code == 403
        assert (await client.get("/health")).json()["ready"] is True


@pytest.mark.parametrize("kind", ["controller", "worker", "data"])
async def test_http_port_refuses_who_shows_no_certificate(tmp_path: Path, authority: Authority, kind: str) -> None:
    node = make_node(tmp_path, authority, kind)
    context = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    async with (
        running(node),
        httpx.AsyncClient(verify=context, base_url=node.http_url, trust_env=False) as client,
    ):
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            await client.get("/health")
        with pytest.raises(httpx.TransportError):
            await client.get(node.http_url.replace("https", "http") + "/health")


async def test_router_is_plain_on_loopback_and_tls_elsewhere(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    for settings, scheme in (
        ({}, "http"),
        ({"host": "0.0.0.0", "advertise": "127.0.0.1"}, "https"),
        ({"host": "0.0.0.0", "advertise": "127.0.0.1", "insecure_http": True}, "http"),
    ):
        node = make_node(tmp_path, authority, "router", **settings)
        async with running(node), httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert node.http_url.startswith(f"{scheme}://127.0.0.1:")
            assert (await client.get(f"{node.http_url}/health")).status_code == 200
    assert "insecure_http" in caplog.text


async def test_ended_certificate_is_a_clear_error(tmp_path: Path, authority: Authority) -> None:
    old = authority.issue_identity("controller", "n1", datetime.timedelta(seconds=0))
    node = Node(NodeConfig("controller", "n1", tmp_path, http_port=0), old)
    with pytest.raises(Unauthenticated, match="join the cluster again"):
        await node.start()
    async with running(Node(node.config, old, authority)) as renewed:  # who has the authority helps itself
        assert renewed.identity != old


def shown_certificate(address: str, identity: Identity) -> x509.Certificate:
    """The certificate that a server shows to a new connection."""
    host, port = address.rsplit(":", 1)
    context = identity.client_context()
    context.check_hostname = False
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as secured:
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


async def test_certificate_is_renewed_at_two_thirds_without_a_restart(
    tmp_path: Path, authority: Authority, admin: Identity
) -> None:
    controller = make_node(tmp_path / "c", authority)
    members = serve_members(controller, authority)
    async with running(controller):
        config = NodeConfig(
            "worker", "w1", tmp_path / "w", http_port=0, controllers=("127.0.0.1:1", controller.grpc_address)
        )
        short = authority.issue_identity("worker", "w1", datetime.timedelta(seconds=6))
        node = Node(config, short)
        async with running(node), channel(node.grpc_address, admin, "worker") as old_connection:
            health = health_pb2_grpc.HealthStub(old_connection)
            await health.Check(health_pb2.HealthCheckRequest())
            assert members.renewals == 0
            async with asyncio.timeout(10):
                while node.identity is short:
                    await asyncio.sleep(0.05)
            left = short.validity()[1] - datetime.datetime.now(datetime.UTC)
            assert left > datetime.timedelta(0)
            serial = x509.load_pem_x509_certificate(node.identity.certificate_pem).serial_number
            http_address = node.http_url.removeprefix("https://")
            for address in (node.grpc_address, http_address):
                shown = await asyncio.to_thread(shown_certificate, address, admin)
                assert shown.serial_number == serial
            await health.Check(health_pb2.HealthCheckRequest())  # old connections go on
            assert Identity.load(tmp_path / "w") == node.identity
            end = node.metrics.get_sample_value("eldric_certificate_end_seconds")
            assert end == node.identity.validity()[1].timestamp()


async def test_pool_connects_anew_after_a_renewal(tmp_path: Path, authority: Authority) -> None:
    node = make_node(tmp_path, authority)
    serve_pipelines(node)
    identity = authority.issue_identity("worker", "w1")
    pool = ChannelPool(lambda: identity)
    async with running(node):
        first = pool.to(node.grpc_address, "controller")
        await status(first)
        assert pool.to(node.grpc_address, "controller") is first
        identity = authority.issue_identity("worker", "w2")
        assert (await status(pool.to(node.grpc_address, "controller"))).id == "worker/w2"
        await status(first)  # calls that run may end
        await pool.forget(node.grpc_address)
        assert (await status(pool.to(node.grpc_address, "controller"))).id == "worker/w2"
        await pool.close()
