"""Callers that mean to wear a node out: messages that unpack to far more, connections that say nothing."""

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from eldric import grpc_server, web
from eldric.channels import channel
from eldric.names import join_address, split_address
from eldric.node import Node
from eldric.security import Authority
from eldric.v1 import membership_pb2, membership_pb2_grpc, pipeline_pb2, pipeline_pb2_grpc
from tests.nodes import STATUS, make_node, running, serve_members, serve_pipelines, status

#: What begins an HTTP/2 connection: the preface and an empty SETTINGS frame (RFC 9113, 3.4).
HTTP2_BEGINS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


@contextlib.asynccontextmanager
async def controller(folder: Path, authority: Authority) -> AsyncIterator[Node]:
    node = make_node(folder, authority)
    serve_members(node, authority)
    serve_pipelines(node)
    async with running(node):
        yield node


def stranger(node: Node, authority: Authority, **settings: Any) -> grpc.aio.Channel:
    """A connection to the join port without a certificate, with no limits of its own."""
    credentials = grpc.ssl_channel_credentials(authority.certificate_pem)
    options = [("grpc.ssl_target_name_override", "controller.eldric"), ("grpc.max_send_message_length", -1)]
    return grpc.aio.secure_channel(node.join_address, credentials, options, **settings)


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_message_of_a_stranger_is_not_unpacked(
    tmp_path: Path, authority: Authority, how: grpc.Compression
) -> None:
    async with controller(tmp_path, authority) as node, stranger(node, authority, compression=how) as connection:
        stub = membership_pb2_grpc.MembershipStub(connection)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Join(membership_pb2.JoinRequest(csr=bytes(1 << 20)), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_compressed_message_of_a_node_is_not_unpacked(tmp_path: Path, authority: Authority) -> None:
    worker = authority.issue_identity("worker", "w1")
    async with controller(tmp_path, authority) as node, channel(node.grpc_address, worker, "controller") as connection:
        call = pipeline_pb2_grpc.PipelineStub(connection).Status
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(STATUS(name="0" * 4000), compression=grpc.Compression.Gzip, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await status(connection)).id == "worker/w1"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Of HTTP/2 (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header as HPACK writes it without a table (RFC 7541, 6.2.2)."""
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


def packed_answer(message: bytes) -> bytes:
    """What a server says that packs its answer though nobody asked for it: HEADERS, DATA, trailers."""
    packed = gzip.compress(message)
    headers = b"\x88" + field(b"content-type", b"application/grpc") + field(b"grpc-encoding", b"gzip")
    data = b"\1" + len(packed).to_bytes(4, "big") + packed
    return frame(1, 4, 1, headers) + frame(0, 0, 1, data) + frame(1, 5, 1, field(b"grpc-status", b"0"))


async def test_a_compressed_answer_is_not_unpacked(authority: Authority) -> None:
    info = pipeline_pb2.PipelineInfo(id="x" * 10_000)
    said = packed_answer(pipeline_pb2.PipelineStatusResponse(pipelines=[info]).SerializeToString())
    answered, over = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(4, 0, 0, b""))
        await reader.readexactly(24)
        kind = -1
        while kind != 1:  # HEADERS: the call
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3]))
            kind = head[3]
        writer.write(said)
        await answered.wait()
        writer.transport.abort()
        over.set()

    tls = authority.issue_identity("controller", "c1").server_context(ssl.CERT_REQUIRED)
    tls.set_alpn_protocols(["h2"])
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    address = join_address("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server:
        async with channel(address, authority.issue_identity("worker", "w1"), "controller") as connection:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pipeline_pb2_grpc.PipelineStub(connection).Status(STATUS(), timeout=5)
            answered.set()
            await over.wait()
        assert "Compression algorithm" in str(caught.value.details())


def address_of(node: Node, port: str) -> tuple[str, int]:
    addresses = {"grpc": node.grpc_address, "join": node.join_address, "http": node.http_url.rpartition("/")[2]}
    return split_address(addresses[port])


async def ended(reader: asyncio.StreamReader) -> None:
    """Returns when the other side has closed the connection."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            while await reader.read(1 << 16):
                pass


@pytest.mark.parametrize("port", ["grpc", "join", "http"])
async def test_a_connection_that_says_nothing_is_closed(
    tmp_path: Path, authority: Authority, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "HANDSHAKE_S", 0.3)
    monkeypatch.setattr(web, "HANDSHAKE_S", 0.3)
    async with controller(tmp_path, authority) as node:
        reader, writer = await asyncio.open_connection(*address_of(node, port))
        await ended(reader)
        writer.close()


def any_server() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@pytest.mark.parametrize("said", [b"", HTTP2_BEGINS[:10], HTTP2_BEGINS])
async def test_a_stranger_that_does_not_join_is_hung_up_on(
    tmp_path: Path, authority: Authority, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(grpc_server, "JOIN_LIFE_S", 0.5)
    async with controller(tmp_path, authority) as node:
        reader, writer = await asyncio.open_connection(*address_of(node, "join"), ssl=any_server())
        writer.write(said)
        await ended(reader)
        writer.transport.abort()


async def test_strangers_take_no_more_connections_than_are_meant_for_them(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "JOIN_CONNECTIONS", 4)
    worker = authority.issue_identity("worker", "w1")
    async with controller(tmp_path, authority) as node, contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            _, writer = await asyncio.open_connection(*address_of(node, "join"))
            stack.callback(writer.close)
        reader, writer = await asyncio.open_connection(*address_of(node, "join"))
        stack.callback(writer.close)
        await ended(reader)
        async with channel(node.grpc_address, worker, "controller") as connection:
            assert (await status(connection)).id == "worker/w1"


@pytest.mark.parametrize("order", [1, -1])
async def test_a_body_of_two_lengths_hides_no_second_request(tmp_path: Path, authority: Authority, order: int) -> None:
    """What a proxy takes for the body of one request, the node must not take for another."""
    lengths = [b"Content-Length: 44\r\n", b"Transfer-Encoding: chunked\r\n"][::order]
    said = b"POST /api/v1/pipeline/deploy HTTP/1.1\r\nHost: node\r\n" + b"".join(lengths)
    said += b"\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: node\r\n\r\n"
    operator = authority.issue_identity("client", "admin").client_context()
    async with controller(tmp_path, authority) as node:
        host, port = address_of(node, "http")
        reader, writer = await asyncio.open_connection(host, port, ssl=operator)
        writer.write(said)
        async with asyncio.timeout(10):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer.lower()
        writer.transport.abort()
