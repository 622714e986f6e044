"""Frames over TCP by ZeroMQ, encrypted with CURVE (https://rfc.zeromq.org/spec/26/). The default transport.

The receiving end is a ROUTER, the sending end a DEALER, whose other direction carries the receiver's grants: a full
queue is a sender that waits, never a receiver that stopped reading, because one that stopped reading would miss
heartbeats and be taken for dead. On the wire: a LinkHello (one part), then frames (two parts: header, payload) one
way, LinkGrants (one part) the other.
"""

import logging
import time
from collections.abc import Callable, Collection
from typing import ClassVar

import zmq

from eldric.transport.addresses import join_address, resolve_local, split_address
from eldric.transport.base import Link, Peer, Transport, TransportOptions, TransportStats
from eldric.transport.errors import InvalidAddress, PeerLost, TransportClosed
from eldric.transport.frame import PROTOCOL_VERSION, Frame
from eldric.transport.threads import require_threads
from eldric.transport.windowed_link import SLICE_S
from eldric.transport.zmq_guard import Guard, ZmqContext
from eldric.transport.zmq_inbox import ZmqInbox
from eldric.transport.zmq_link import Connection, ZmqLink, connect
from eldric.v1 import frame_pb2

logger = logging.getLogger(__name__)

_THREADS = 3  # of ZeroMQ's two, and the guard's
CURVE_KEY_CHARACTERS = 40  # 32 bytes in Z85


class ZmqTransport(Transport):
    """See the module. Each transport has a context, an I/O thread, a guard thread and a key pair of its own.

    Make it before the stage's thread is pinned to cores: ZeroMQ's threads inherit the pinning.
    """

    scheme = "zmq"
    ends_at_peer: ClassVar[bool] = True  # whether a link's TCP connection does, so that its round trip is the link's

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        super().__init__(pipeline_id, stage, options)
        require_threads(_THREADS)
        self._keys = zmq.curve_keypair() if self.options.encrypt else None
        self._closed = False
        self._on_loss: Callable[[], None] | None = None
        self._context: ZmqContext = zmq.Context()
        self._guard = Guard(self._context, lambda key: self._inbox.is_allowed(key))
        self._inbox = ZmqInbox(self._context, self._guard, self.filter, self.losses, self.options, self._keys)
        if self._keys is None:
            logger.warning("tensor channel without encryption pipeline=%s stage=%d", pipeline_id, stage)

    @property
    def public_key(self) -> str:
        return "" if self._keys is None else self._keys[0].decode()

    @property
    def encryption(self) -> str:
        return "none" if self._keys is None else "curve"

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        self._check_open()
        endpoint = join_address("tcp", resolve_local(host), port)
        return join_address(self.scheme, host, self._inbox.bind(endpoint))

    def allow(self, keys: Collection[str]) -> None:
        self._inbox.allow(keys)

    def connect(self, peer: Peer, timeout: float = 5.0) -> Link:
        self._check_open()
        good = self._linked(peer)
        if good is not None:
            return good
        endpoint = join_address("tcp", *split_address(peer.address, self.scheme))
        if self._keys is not None and len(peer.public_key) != CURVE_KEY_CHARACTERS:
            raise InvalidAddress(f"{peer.public_key!r} is no CURVE key of {CURVE_KEY_CHARACTERS} Z85 characters")

        def on_lost(connection: Connection, reason: str) -> None:
            lost = PeerLost(peer.stage, reason, inbound=False, public_key=peer.public_key)
            self.losses.add(lost, connection)
            self._inbox.look()
            if self._on_loss is not None:
                self._on_loss()

        socket, connection = connect(
            self._context, self._guard, self.options, endpoint, peer, self._keys, timeout, on_lost
        )
        hello = frame_pb2.LinkHello(
            protocol_version=PROTOCOL_VERSION, pipeline_id=self.pipeline_id, from_stage=self.stage
        )
        if not self.ends_at_peer:
            connection.descriptor = -1
        link = ZmqLink(peer, socket, connection, hello, self.encode)
        link.confirm(self.epoch)
        self._links.append(link)
        return link

    def recv(self, timeout: float | None = None) -> Frame | None:
        self._check_open()
        return self._inbox.recv(timeout)

    def wake(self) -> None:
        self._inbox.wake()

    def settle(self, ask: bool = False) -> None:
        super().settle(ask)
        self._inbox.settle()

    def on_loss(self, call: Callable[[], None]) -> bool:
        self._on_loss = call
        return True

    @property
    def stats(self) -> TransportStats:
        return self._inbox.stats

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wait_for_peers()
        for link in self._links:
            link.close()
        self._inbox.close()
        self._guard.stop()
        self._context.term()

    def _wait_for_peers(self) -> None:
        """Until they have taken what was sent. Peers that close at the same time wait for us as we do for them."""
        deadline = time.monotonic() + self.options.linger_s
        links = [link for link in self._links if isinstance(link, ZmqLink)]
        for link in links:
            link.start_closing()
        while links := [link for link in links if not link.finish_closing()]:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            zmq.select([self._inbox.socket, *(link.socket for link in links)], [], [], min(left_s, SLICE_S))
            self._inbox.discard()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"the transport of stage {self.stage} is closed")
