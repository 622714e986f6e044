"""What a node's ports agree to in TLS."""

import asyncio
import ssl
from pathlib import Path

import pytest

from eldric.names import split_address
from eldric.security import Authority, Identity
from tests.nodes import make_node, running, serve_members


def asking(identity: Identity, version: ssl.TLSVersion, ciphers: str) -> ssl.SSLContext:
    """A client of one version that would take anything and anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = version
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    identity.put_into(context)
    return context


async def agreed(address: str, context: ssl.SSLContext) -> str:
    """Version and cipher; empty when the server agrees to nothing."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(10):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, ssl.SSLError):
        return ""
    connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
    cipher = connection.cipher()
    writer.transport.abort()
    return f"{connection.version()} {cipher and cipher[0]}"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_ports_speak_nothing_that_is_weak(tmp_path: Path) -> None:
    authority = Authority.create("demo")
    node = make_node(tmp_path, authority)
    serve_members(node, authority)
    identity = authority.issue_identity("client", "admin")
    async with running(node):
        for address in (node.grpc_address, node.join_address, node.http_url.rpartition("/")[2]):
            modern = {
                version: await agreed(address, asking(identity, version, "ALL"))
                for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
            }
            assert "TLSv1.2 ECDHE-ECDSA-" in modern[ssl.TLSVersion.TLSv1_2]
            assert "TLSv1.3 TLS_" in modern[ssl.TLSVersion.TLSv1_3]
            for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
                assert await agreed(address, asking(identity, version, "ALL")) == ""
            for ciphers in ("eNULL", "aNULL", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES256-SHA384", "AES128-SHA"):
                assert await agreed(address, asking(identity, ssl.TLSVersion.TLSv1_2, ciphers)) == "", ciphers
