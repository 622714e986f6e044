"""Becoming a member: pin the authority, show the token, get a certificate; later, renew it."""

import asyncio
import contextlib
import ssl
from typing import Any, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from eldric.channels import OPTIONS, call_errors, channel
from eldric.errors import DataLoss, DeadlineExceeded, Unauthenticated, Unavailable
from eldric.names import server_name, split_address
from eldric.security.certificates import Identity, fingerprint, make_csr, subject_of
from eldric.security.tokens import JoinToken
from eldric.v1 import membership_pb2, membership_pb2_grpc

TIMEOUT_S = 10.0


async def fetch_authority(address: str, sha256: str) -> bytes:
    """The authority's certificate (PEM) that the server at `address` shows, if its SHA-256 (DER, hex) is `sha256`.

    Nothing is sent. Raises Unauthenticated when the server shows another authority, Unavailable when nobody answers,
    DeadlineExceeded after ten seconds.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what is shown is compared with the pinned digest below
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except TimeoutError:
        raise DeadlineExceeded(f"{address} did not answer within {TIMEOUT_S:.0f} s") from None
    except (OSError, ssl.SSLError) as error:
        raise Unavailable(f"{address} cannot be reached: {error}") from None
    try:
        chain = _shown_chain(writer.get_extra_info("ssl_object"))
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
    for certificate in chain:
        if fingerprint(certificate) == sha256:
            return certificate
    raise Unauthenticated(
        f"{address} belongs to another cluster than this join token (or somebody stands in between): nothing was sent"
    )


def _shown_chain(connection: Any) -> list[bytes]:
    """The certificates (PEM) that the server sent, unverified."""
    if hasattr(connection, "get_unverified_chain"):  # Python 3.13
        return [_to_pem(bytes(der)) for der in connection.get_unverified_chain()]
    chain = connection._sslobj.get_unverified_chain() or []
    return [cast(str, certificate.public_bytes()).encode() for certificate in chain]


def _to_pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


async def join(address: str, token: JoinToken, kind: str, name: str) -> Identity:
    """A new identity from the controller whose join port is `address`. Raises Unauthenticated or PermissionDenied when
    the token does not admit this node, Unavailable when nobody answers."""
    authority = await fetch_authority(address, token.authority_sha256)
    csr, key = make_csr(kind, name)
    request = membership_pb2.JoinRequest(token=token.format(), csr=csr, kind=kind, name=name)
    credentials = grpc.ssl_channel_credentials(authority)
    options = [*OPTIONS, ("grpc.ssl_target_name_override", server_name("controller"))]
    async with grpc.aio.secure_channel(address, credentials, options=options) as open_channel:
        with call_errors(f"controller at {address}"):
            answer = await membership_pb2_grpc.MembershipStub(open_channel).Join(request, timeout=TIMEOUT_S)
    return _checked(Identity(kind, name, authority, answer.certificate, key))


async def renew(address: str, identity: Identity) -> Identity:
    """A new certificate for the same node, over mutual TLS with the old one, for a new key."""
    csr, key = make_csr(identity.kind, identity.name)
    async with channel(address, identity, "controller") as open_channel:
        with call_errors(f"controller at {address}"):
            stub = membership_pb2_grpc.MembershipStub(open_channel)
            answer = await stub.Renew(membership_pb2.RenewRequest(csr=csr), timeout=TIMEOUT_S)
    return _checked(Identity(identity.kind, identity.name, identity.authority_pem, answer.certificate, key))


def _checked(identity: Identity) -> Identity:
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    key = serialization.load_pem_private_key(identity.key_pem, password=None)
    if certificate.public_key() != key.public_key() or subject_of(certificate)[1:] != (identity.kind, identity.name):
        raise DataLoss("the controller answered with a certificate for somebody else")
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.authority_pem))
    except Exception:
        raise Unauthenticated("the certificate in the answer is not of this cluster's authority") from None
    return identity
