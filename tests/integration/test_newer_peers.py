"""Peers of a newer version, which say more than this one understands, over real sockets: no harm."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from eldric import PROTOCOL
from eldric.channels import channel
from eldric.names import split_address
from eldric.transport.base import Transport
from eldric.transport.frame import PROTOCOL_VERSION
from eldric.v1 import frame_pb2, heartbeat_pb2, registry_pb2
from eldric.v1.heartbeat_pb2_grpc import HeartbeatStub
from eldric.v1.registry_pb2_grpc import RegistryStub
from tests.controllers import controller_here
from tests.newer import newer
from tests.transports import PIPELINE, make_transport, receive


async def test_a_newer_worker_registers_and_beats(tmp_path: Path) -> None:
    """Its states, devices and stages have fields and numbers that the controller does not know."""
    async with controller_here(tmp_path) as (world, controller):
        identity = world.authority.issue_identity("worker", "w9")
        async with channel(world.address, identity, "controller") as connection:
            registry: Any = RegistryStub(connection)
            resources = registry_pb2.Resources(cores=2, memory_bytes=1 << 30, transports=["teleport", "zmq"])
            resources.devices.add(name="QPU0", memory_bytes=1)
            node = registry_pb2.Node(
                id="worker/w9",
                name="w9",
                kind=registry_pb2.WORKER,
                grpc_address="127.0.0.1:1",
                protocol=PROTOCOL,
                incarnation=7,
                resources=resources,
            )
            answer = await registry.Register(newer(registry_pb2.RegisterRequest(node=node)))
            assert answer.protocol == PROTOCOL
            beat = heartbeat_pb2.BeatRequest(node_id="worker/w9", incarnation=7, sequence=1, memory_used_bytes=5)
            beat.stages.add(pipeline_id="p", epoch=1, state=99).dropped_frames["bored"] = 3
            call: Any = HeartbeatStub(connection).Beat()
            await call.write(newer(beat))
            assert (await asyncio.wait_for(call.read(), 5)).sequence == 1
            known = controller.cluster.registry.get("worker/w9")
            assert known is not None and known.memory_used_bytes == 5 and len(known.stages) == 1
            assert (await world.calls.nodes())["w9"] == "UP"
            call.cancel()


@contextlib.contextmanager
def raw_peer(receiver: Transport) -> Iterator["zmq.Socket[bytes]"]:
    """A socket that the receiver lets in, to say on it whatever a test wants."""
    public, secret = zmq.curve_keypair()
    receiver.allow([public.decode()])
    host, port = split_address(receiver.listen().removeprefix("zmq://"))
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.rcvtimeo = 5000
        peer.curve_publickey, peer.curve_secretkey = public, secret
        peer.curve_serverkey = receiver.public_key.encode()
        peer.connect(f"tcp://{host}:{port}")
        yield peer


def hello(version: int = PROTOCOL_VERSION) -> frame_pb2.LinkHello:
    return newer(frame_pb2.LinkHello(protocol_version=version, pipeline_id=PIPELINE, from_stage=0, epoch=1))


def test_hellos_and_frames_of_a_newer_sender_are_taken() -> None:
    with make_transport("zmq", 1) as receiver, raw_peer(receiver) as peer:
        peer.send(hello().SerializeToString())
        run = frame_pb2.FrameHeader(
            protocol_version=PROTOCOL_VERSION, pipeline_id=PIPELINE, epoch=1, kind=frame_pb2.FRAME_KIND_PROBE
        )
        for number in range(1, 4):
            run.serial = run.step = number
            peer.send_multipart([newer(run).SerializeToString(), b""])
            assert receive(receiver).header.step == number
        assert (receiver.stats.peers, receiver.stats.refused) == (1, 0)
        assert not any(receiver.stats.dropped.values())


def test_a_sender_of_another_protocol_is_refused_with_both_versions() -> None:
    """Fields may be added at any time; whatever changes what frames mean has another protocol version."""
    with make_transport("zmq", 1) as receiver, raw_peer(receiver) as peer:
        peer.send(hello(PROTOCOL_VERSION + 1).SerializeToString())
        assert receiver.recv(0.2) is None
        refused = frame_pb2.LinkGrant.FromString(peer.recv()).refused
        assert refused == f"protocol version {PROTOCOL_VERSION + 1}, this stage speaks {PROTOCOL_VERSION}"
        assert receiver.stats.refused == 1
