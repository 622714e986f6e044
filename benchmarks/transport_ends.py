"""The two ends that benchmarks/transport.py measures between: a bare TCP socket, and any transport."""

import multiprocessing
import os
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Protocol

from eldric.transport.base import Link, Peer, Transport, TransportOptions
from eldric.transport.frame import Frame, FrameDtype, FrameKind, Header, Run
from eldric.transport.registry import create
from eldric.transport.spin import Spinner

ROWS = 4  # of a decode step with four sequences
RAW_HEADER_BYTES = 64  # about what a step's header takes
ECHO, SINK, ANSWER, STOP = 1, 2, 3, 4  # what the far end does with a frame; travels as the step number


@dataclass(frozen=True, slots=True)
class Variant:
    """A transport and how it is set up."""

    name: str
    scheme: str
    encrypt: bool = False
    spins: bool = True  # whether receivers look for frames for a moment before they sleep
    ucx_ways: str = ""  # what UCX may use


class NearEnd(Protocol):
    """What is measured."""

    def round_trip(self, payload: memoryview) -> None:
        """There and back."""

    def stream(self, payload: memoryview, frames: int) -> None:
        """Send that many, and wait until the last has arrived."""

    def stop(self) -> None:
        """End the far end."""


def step_header(action: int, payload_bytes: int) -> Header:
    """A decode step of ROWS sequences whose hidden states have that many bytes in all."""
    runs = tuple([Run(slot, 1000 + slot, 1, True) for slot in range(ROWS)])
    shape = (ROWS, payload_bytes // 4 // ROWS)
    return Header(kind=FrameKind.HIDDEN, step=action, lane=1, dtype=FrameDtype.F32, shape=shape, runs=runs)


class SocketEnd:
    """A TCP socket: a header of fixed size, then the payload. spins: look for a moment first, as transports do."""

    def __init__(self, sock: socket.socket, largest: int, spins: bool) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._spinner = sock, Spinner(TransportOptions().spin_s if spins else 0.0)
        self._buffer = memoryview(bytearray(RAW_HEADER_BYTES + largest))
        self._byte = bytearray(1)

    def round_trip(self, payload: memoryview) -> None:
        self._send(ECHO, payload)
        self._read(self._buffer[: RAW_HEADER_BYTES + payload.nbytes])

    def stream(self, payload: memoryview, frames: int) -> None:
        for number in range(frames):
            self._send(SINK if number < frames - 1 else ANSWER, payload)
        self._read(self._buffer[:RAW_HEADER_BYTES])

    def stop(self) -> None:
        self._send(STOP, memoryview(b""))
        self._socket.close()

    def serve(self) -> None:
        header, body = self._buffer[:RAW_HEADER_BYTES], self._buffer[RAW_HEADER_BYTES:]
        action = ECHO
        while action != STOP:
            self._read(header)
            action, size = int.from_bytes(header[:8]), int.from_bytes(header[8:16])
            self._read(body[:size])
            if action in (ECHO, ANSWER):
                self._send(action, body[: size if action == ECHO else 0])

    def _send(self, action: int, payload: memoryview) -> None:
        header = action.to_bytes(8) + payload.nbytes.to_bytes(8) + bytes(RAW_HEADER_BYTES - 16)
        sent = self._socket.sendmsg([header, payload])
        if sent < RAW_HEADER_BYTES + payload.nbytes:
            self._socket.sendall(payload[sent - RAW_HEADER_BYTES :])

    def _read(self, buffer: memoryview) -> None:
        while buffer.nbytes:
            found = self._spinner.wait(self._is_readable, None)
            count = self._socket.recv_into(buffer)
            if not found:
                self._spinner.slept()
            if not count:
                raise ConnectionError("the other end closed the socket")
            buffer = buffer[count:]

    def _is_readable(self) -> bool:
        try:
            self._socket.recv_into(self._byte, 1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True


class TransportEnd:
    """A transport and its link to the other end."""

    def __init__(self, transport: Transport, link: Link) -> None:
        self._transport, self._link = transport, link

    def round_trip(self, payload: memoryview) -> None:
        self._link.send(step_header(ECHO, payload.nbytes), payload)
        self._receive().array()

    def stream(self, payload: memoryview, frames: int) -> None:
        for number in range(frames):
            self._link.send(step_header(SINK if number < frames - 1 else ANSWER, payload.nbytes), payload)
        self._receive()

    def stop(self) -> None:
        self._link.send(Header(kind=FrameKind.PROBE, step=STOP))
        self._transport.close()

    def serve(self) -> None:
        while (frame := self._receive()).header.step != STOP:
            if frame.header.step == ECHO:
                self._link.send(frame.header, frame.payload)
            elif frame.header.step == ANSWER:
                self._link.send(Header(kind=FrameKind.PROBE))
        self._transport.close()

    def _receive(self) -> Frame:
        frame = self._transport.recv(120)
        if frame is None:
            raise TimeoutError("the other end did not answer")
        return frame


@contextmanager
def socket_ends(largest: int, cpus: Collection[int], spins: bool = False) -> Iterator[NearEnd]:
    with other_process(_serve_socket, cpus, largest, spins) as pipe:
        end = SocketEnd(socket.create_connection(pipe.recv()), largest, spins)
        yield end
        end.stop()


@contextmanager
def transport_ends(variant: Variant, cpus: Collection[int]) -> Iterator[NearEnd]:
    """Between two processes; inproc: between two threads of this one."""
    if variant.ucx_ways:
        os.environ["UCX_TLS"] = variant.ucx_ways  # the only way to tell UCX; the other process inherits it
    near = _transport(variant, 0)
    here, there = multiprocessing.Pipe()
    if variant.scheme == "inproc":
        thread = threading.Thread(target=_serve_transport, args=(there, variant))
        thread.start()
        end = _meet(near, here)
        yield end
        end.stop()
        thread.join()
    else:
        with other_process(_serve_transport, cpus, variant) as pipe:
            end = _meet(near, pipe)
            yield end
            end.stop()


@contextmanager
def other_process(target: object, cpus: Collection[int], *arguments: object) -> Iterator[Connection]:
    """A process that runs target(pipe, *arguments) on those cores."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_pinned, args=(target, cpus, there, *arguments), daemon=True)
    process.start()
    try:
        yield here
        process.join(10)
    finally:
        process.kill()
        process.join()


def pin(cpus: Collection[int]) -> None:
    """Keep this process, and the threads that it will make, on those cores. Nothing where that cannot be done."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _pinned(target, cpus, pipe, *arguments):  # type: ignore[no-untyped-def]
    pin(cpus)
    target(pipe, *arguments)


def _serve_socket(pipe: Connection, largest: int, spins: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname())
        sock, _ = server.accept()
    with sock:
        SocketEnd(sock, largest, spins).serve()


def _serve_transport(pipe: Connection, variant: Variant) -> None:
    _meet(_transport(variant, 1), pipe).serve()


def _transport(variant: Variant, stage: int) -> Transport:
    options = TransportOptions(silence_s=30, encrypt=variant.encrypt)
    if not variant.spins:
        options = replace(options, spin_s=0.0)
    transport = create(variant.scheme, "benchmark", stage, options)
    transport.set_epoch(1)
    return transport


def _meet(transport: Transport, pipe: Connection) -> TransportEnd:
    """Exchange addresses and keys with the other end, and link to it."""
    pipe.send((transport.listen(), transport.public_key))
    address, key = pipe.recv()
    transport.allow([key])
    return TransportEnd(transport, transport.connect(Peer(address, key, 1 - transport.stage)))
