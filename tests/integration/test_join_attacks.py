"""What somebody with a join token, or with a certificate of a cluster, cannot make of it."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from eldric.channels import call_errors, channel
from eldric.errors import AlreadyExists, EldricError, InvalidRequest, PermissionDenied, Unauthenticated
from eldric.security import Authority, JoinToken, join, make_csr
from eldric.security.certificates import subject_of
from eldric.v1 import membership_pb2
from eldric.v1.membership_pb2_grpc import MembershipStub
from tests.controllers import World, controller_here


async def token_of(world: World, **fields: Any) -> JoinToken:
    made = await world.calls.membership.CreateToken(membership_pb2.CreateTokenRequest(**fields))
    return JoinToken.parse(made.token)


async def test_a_token_for_one_node_admits_one_however_many_ask_at_once(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, controller):
        token = await token_of(world, uses=1)
        asked = [join(controller.node.join_address, token, "worker", f"w{number}") for number in range(12)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, EldricError)]
        assert len(refused) == 11
        assert {type(each) for each in refused} == {Unauthenticated}


async def test_a_token_outlives_no_restart_beyond_its_uses(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, controller):
        token = await token_of(world, uses=1)
        await join(controller.node.join_address, token, "worker", "w1")
    async with controller_here(tmp_path) as (world, controller):
        with pytest.raises(Unauthenticated, match="token"):
            await join(controller.node.join_address, token, "worker", "w2")


@pytest.mark.parametrize("name", ["w1", "W1"])
async def test_a_joiner_does_not_take_the_name_of_a_running_node(tmp_path: Path, name: str) -> None:
    async with controller_here(tmp_path) as (world, controller):
        await world.add_workers("w1")
        token = await token_of(world, unlimited=True)
        with pytest.raises(AlreadyExists, match="worker/w1 is a member"):
            await join(controller.node.join_address, token, "worker", name)
        with pytest.raises(PermissionDenied):
            await join(controller.node.join_address, token, "controller", "main")


def test_tls_takes_names_in_another_case_for_the_same(tmp_path: Path) -> None:
    """Which is why a joiner does not get them."""
    authority = Authority.create("demo")
    shown = authority.issue_identity("worker", "W1").certificate_pem
    names = x509.load_pem_x509_certificate(shown).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert "W1.worker.eldric" in names.value.get_values_for_type(x509.DNSName)
    server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
    accepted = authority.issue_identity("worker", "W1").server_context(ssl.CERT_NONE).wrap_bio(client, server, True)
    asking = authority.issue_identity("client", "c").client_context()
    connected = asking.wrap_bio(server, client, server_hostname="w1.worker.eldric")
    for _ in range(4):
        for each in (connected, accepted):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("name", ["../w1", "w1/../w2", "w1\n", "w1\0", "", ".", "a..b", "*", "w1.worker.eldric/x", "é"])
async def test_a_joiner_gets_no_odd_name(tmp_path: Path, name: str) -> None:
    async with controller_here(tmp_path) as (world, controller):
        token = await token_of(world, unlimited=True)
        credentials = grpc.ssl_channel_credentials(world.authority.certificate_pem)
        options = [("grpc.ssl_target_name_override", "controller.eldric")]
        async with grpc.aio.secure_channel(controller.node.join_address, credentials, options) as connection:
            stub: Any = MembershipStub(connection)
            request = membership_pb2.JoinRequest(
                token=token.format(), csr=make_csr("worker", "w")[0], kind="worker", name=name
            )
            with pytest.raises(InvalidRequest, match="no name for a node"), call_errors():
                await stub.Join(request)


def request_of(common_name: str, *names: x509.GeneralName) -> bytes:
    """A signing request that claims to be somebody."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def test_renewal_makes_nobody_somebody_else(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, _):
        worker = world.authority.issue_identity("worker", "w1")
        claims = (
            x509.UniformResourceIdentifier("spiffe://eldric/test/client/operator"),
            x509.DNSName("controller.eldric"),
            x509.DNSName("main.controller.eldric"),
            x509.DNSName("MAIN.CONTROLLER.ELDRIC"),
            x509.DNSName("*.eldric"),
            x509.DNSName("eldric"),
        )
        async with channel(world.address, worker, "controller") as connection:
            stub: Any = MembershipStub(connection)
            for name in ("client/operator", "worker/w2", "controller/main"):
                with pytest.raises(PermissionDenied, match="asks for a certificate of"), call_errors():
                    await stub.Renew(membership_pb2.RenewRequest(csr=request_of(name, *claims)))
            answer = await stub.Renew(membership_pb2.RenewRequest(csr=request_of("", *claims)))
        made = x509.load_pem_x509_certificate(answer.certificate)
        assert subject_of(made) == ("test", "worker", "w1")
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(names.get_values_for_type(x509.DNSName)) == {"worker.eldric", "w1.worker.eldric"}
        assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


async def test_a_nodes_certificate_is_no_authority(tmp_path: Path) -> None:
    """A certificate that a worker signs with its own key admits nobody."""
    async with controller_here(tmp_path) as (world, _):
        worker = world.authority.issue_identity("worker", "w1")
        pretended = Authority("test", worker.certificate_pem, worker.key_pem)
        forged = pretended.issue_identity("client", "operator")
        chain = forged.certificate_pem + worker.certificate_pem
        credentials = grpc.ssl_channel_credentials(world.authority.certificate_pem, forged.key_pem, chain)
        options = [("grpc.ssl_target_name_override", "controller.eldric")]
        async with grpc.aio.secure_channel(world.address, credentials, options) as connection:
            stub: Any = MembershipStub(connection)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.CreateToken(membership_pb2.CreateTokenRequest(kind="client"), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
