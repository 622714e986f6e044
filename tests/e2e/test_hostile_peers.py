"""Strangers at a worker's tensor port: they are refused and counted, and what runs is not disturbed."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zmq

from eldric.names import split_address
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.v1 import common_pb2, frame_pb2
from tests.e2e.clusters import ENDLESS, LiveCluster, endless_on, tokens_until
from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.timeout(60)

#: ZMTP 3.1's greeting (https://rfc.zeromq.org/spec/37/) of a peer without security, and one that stops in the middle.
NULL_GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1NULL" + bytes(48)
GARBAGE = [
    random.Random(0).randbytes(4096),
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    NULL_GREETING,
    NULL_GREETING[:11],
    b"",
]


@pytest.fixture
async def live(cluster: Cluster, tmp_path: Path) -> AsyncIterator[LiveCluster]:
    async with endless_on(cluster.folder, tmp_path, transport="zmq") as made:
        yield made


async def endpoint(live: LiveCluster, index: int) -> tuple[str, common_pb2.TensorEndpoint]:
    """The worker of a stage of `endless`, and where it listens for tensors."""
    worker = (await live.pipeline()).stages[index].worker
    (stage,) = [each for each in await live.stages_held(worker) if each.name == ENDLESS]
    return worker, stage.endpoint


async def refused(live: LiveCluster, worker: str, index: int) -> float:
    return (await live.metrics(worker))["eldric_refused_links_total", ENDLESS, str(index)]


def hostile_messages() -> Iterator[list[bytes]]:
    hello = frame_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, pipeline_id="any", from_stage=0)
    yield [hello.SerializeToString()]
    yield [b"header", bytes(100_000)]
    yield [b"", b"", b"", b""]
    yield [random.Random(1).randbytes(300)] * 3


def zmq_peer(context: "zmq.Context[zmq.Socket[bytes]]", address: str, server_key: bytes | None) -> "zmq.Socket[bytes]":
    """A peer with a key that no controller gave to anybody, or with none."""
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    if server_key is not None:
        peer.curve_publickey, peer.curve_secretkey = zmq.curve_keypair()
        peer.curve_serverkey = server_key
    peer.connect("tcp://" + address.removeprefix("zmq://"))
    for message in hostile_messages():
        peer.send_multipart(message)
    return peer


@pytest.mark.parametrize("index", [0, 1])
async def test_strangers_at_the_tensor_port_disturb_nobody_and_are_counted(live: LiveCluster, index: int) -> None:
    expected = await tokens_until(live.endless(max_tokens=400), 400)
    worker, tensors = await endpoint(live, index)
    before = await refused(live, worker, index)
    events = live.endless(max_tokens=400)
    answer = await tokens_until(events, 20)

    sockets = []
    for garbage in GARBAGE:
        sockets.append(socket.create_connection(split_address(tensors.address.removeprefix("zmq://"))))
        sockets[-1].sendall(garbage)
    with zmq.Context() as context:
        without_key = zmq_peer(context, tensors.address, None)
        with_wrong_key = zmq_peer(context, tensors.address, tensors.public_key.encode())
        for_another_server = zmq_peer(context, tensors.address, zmq.curve_keypair()[0])
        answer += await tokens_until(events, 400)
        async with asyncio.timeout(10):
            while await refused(live, worker, index) < before + 4:
                await asyncio.sleep(0.02)
        for peer in (without_key, with_wrong_key, for_another_server):
            assert not peer.poll(0), "nobody answers a stranger"
            peer.close()
    for each in sockets:
        each.close()
    assert answer == expected
    assert await tokens_until(live.endless(max_tokens=400), 400) == expected
    metrics = await live.metrics(worker)
    dropped = [value for name, value in metrics.items() if name[:2] == ("eldric_dropped_frames_total", ENDLESS)]
    assert dropped and not any(dropped), "no frame of a stranger came as far as that"
