"""Frames by UCX (https://openucx.readthedocs.io): InfiniBand or RoCE where there is one, shared memory, TCP.

UCX encrypts nothing and asks nobody who he is: this transport is for networks that the operator trusts. Only who links
to whom is proven, by keys, over a TCP connection of the transport's own (door.py), which also tells when a peer dies,
because UCX does not over all of its ways. Which ways it takes is for UCX to choose, or for its variable UCX_TLS.
"""

import logging
import secrets
import socket
import time

from eldric.transport.addresses import join_address, resolve_local, split_address
from eldric.transport.base import Link, Peer, TransportOptions
from eldric.transport.errors import ConnectFailed, ListenFailed
from eldric.transport.mailbox import END, FRAME, HELLO, NOTHING
from eldric.transport.opening import Wire
from eldric.transport.spin import give_way
from eldric.transport.ucx_mailbox import TAG, UcxMailbox
from eldric.transport.ucx_worker import Endpoint, Worker, libucxx
from eldric.transport.windowed_link import Encode, WindowedLink
from eldric.transport.wired import WiredTransport
from eldric.v1 import frame_pb2

logger = logging.getLogger(__name__)


class UcxTransport(WiredTransport):
    """See the module. Each transport has a UCX worker of its own, and two threads beside the stage's."""

    scheme = "ucx"

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        options = options or TransportOptions()
        mailbox = UcxMailbox(options)
        super().__init__(pipeline_id, stage, options, mailbox)
        self._worker = mailbox.worker
        logger.warning("tensor channel without encryption pipeline=%s stage=%d", pipeline_id, stage)

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        self._check_open()
        local = resolve_local(host)
        try:
            listener = socket.create_server((local, port), family=socket.AF_INET6 if ":" in local else socket.AF_INET)
        except OSError as error:
            raise ListenFailed(f"cannot listen on {host} port {port}: {error}") from error
        number = listener.getsockname()[1]
        self._door.listen(listener)
        return join_address(self.scheme, host, number)

    def _make_link(self, peer: Peer, hello: frame_pb2.LinkHello, timeout: float) -> Link:
        place = split_address(peer.address, self.scheme)
        tag = secrets.randbits(64)
        wire, grant = self._door.connect(
            lambda left_s: socket.create_connection(place, left_s),
            peer,
            hello,
            timeout,
            address=TAG.pack(tag) + self._worker.address,
        )
        try:
            endpoint = self._worker.connect(wire.address, tag)
        except (libucxx.UCXError, ValueError, RuntimeError) as error:
            wire.hang_up("it was closed by this end")
            raise ConnectFailed(f"stage {peer.stage} at {peer.address} is not reached by UCX: {error}") from error
        return UcxLink(peer, wire, hello, grant, self._worker, endpoint, self.encode, self.options.linger_s)

    def _finish(self, deadline: float) -> None:
        links = [link for link in self._links if isinstance(link, UcxLink)]
        for link in links:
            link.start_closing()
        waiting = links
        while (waiting := [link for link in waiting if not link.finish_closing()]) and time.monotonic() < deadline:
            arrival = self._mailbox.take()
            if arrival is not None:
                self._take(arrival)  # so that a neighbour that closes, too, need not wait for us
            else:
                give_way()
        for link in links:
            link.close()
        self._worker.drain(deadline)


class UcxLink(WindowedLink):
    """See UcxTransport."""

    def __init__(
        self,
        peer: Peer,
        wire: Wire,
        hello: frame_pb2.LinkHello,
        grant: frame_pb2.LinkGrant,
        worker: Worker,
        endpoint: Endpoint,
        encode: Encode,
        linger_s: float,
    ) -> None:
        super().__init__(peer, encode)
        self._wire, self._hello, self._worker, self._endpoint = wire, hello, worker, endpoint
        self._linger_s = linger_s
        self._open = True
        self._window.granted(grant)

    @property
    def epoch(self) -> int:
        return self._wire.epoch

    def confirm(self, epoch: int) -> None:
        self._wire.epoch = self._hello.epoch = epoch
        self._say(HELLO, self._hello.SerializeToString())

    @property
    def closed(self) -> str | None:
        return self._wire.closed

    def start_closing(self) -> None:
        """Send nothing more, and ask the peer to say when it has taken everything."""
        if self.closed is None:
            self._hello.closing = True
            self._say(HELLO, self._hello.SerializeToString())

    def finish_closing(self) -> bool:
        """Whether there is nothing left to wait for."""
        if self.closed is None:
            self._read_grants()
        return self.closed is not None or not self._window.frames_under_way

    def close(self) -> None:
        """The connection ends once what was sent is gone; the peer takes it first."""
        if not self._open:
            return
        self._open = False
        if self._wire.closed is None:
            self._say(END, b"")
            self._wire.closed = "it was closed by this end"
        self._worker.retire(self._endpoint, time.monotonic() + self._linger_s, self._hang_up)

    def _hang_up(self) -> None:
        self._wire.hang_up("it was closed by this end")

    def _say(self, kind: int, data: bytes) -> None:
        self._worker.send(self._endpoint, kind, data, NOTHING)

    def _try_send(self, data: bytes, view: memoryview) -> bool:
        self._worker.send(self._endpoint, FRAME, data, view)
        self._window.sent(view.nbytes)
        return True

    def _wait_for_room(self, wait_s: float) -> None:
        self._worker.sleep(wait_s)

    def _take_grants(self) -> None:
        while self._open and (message := self._worker.take(self._endpoint)) is not None:
            if message:
                self._granted(message)

    def _refused(self, reason: str) -> None:
        self._wire.hang_up(reason)
