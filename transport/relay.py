"""Frames by way of an edge, for a link of which one end is behind NAT: ZeroMQ through the tunnel of that end.

On the wire it is what zmq.py says, encrypted with CURVE from end to end: the edge passes on what it cannot read. The
node behind NAT listens at an address that the edge gives it, and reaches others through a port of its own machine.
A tunnel that breaks for a short time loses nothing; so a peer may be silent for longer here before it counts as lost.
"""

import logging
from dataclasses import replace

from eldric.transport.addresses import HostPort, join_address, split_address
from eldric.transport.base import Link, Peer, TransportOptions
from eldric.transport.errors import ConnectFailed, ListenFailed
from eldric.transport.zmq import ZmqTransport

logger = logging.getLogger(__name__)


class RelayTransport(ZmqTransport):
    """See the module. `options.relay` is the node's tunnel; an end without one listens and connects directly."""

    scheme = "relay"
    ends_at_peer = False

    def __init__(self, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> None:
        given = options or TransportOptions()
        patient = replace(given, silence_s=max(given.silence_s, given.relay_silence_s))
        super().__init__(pipeline_id, stage, patient)
        self._relay = given.relay
        self._exposed: list[str] = []

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        address = super().listen(host, port)
        if self._relay is None:
            return address
        try:
            exposed = self._relay.expose(*split_address(address, self.scheme))
        except Exception as error:  # of the tunnel, whatever it is
            raise ListenFailed(f"the edge gives no address: {error}") from error
        self._exposed.append(exposed)
        return f"{self.scheme}://{exposed}"

    def connect(self, peer: Peer, timeout: float = 5.0) -> Link:
        if self._relay is None:
            return super().connect(peer, timeout)
        there = split_address(peer.address, self.scheme)
        try:
            door = self._relay.reach(_text(there))
        except Exception as error:  # of the tunnel, whatever it is
            raise ConnectFailed(f"stage {peer.stage} at {peer.address}: no way through the edge: {error}") from error
        address = f"{self.scheme}://{door}"
        try:
            return super().connect(replace(peer, address=address), timeout)
        except ConnectFailed as error:
            raise ConnectFailed(str(error).replace(address, f"{peer.address} (through the edge)")) from error

    def close(self) -> None:
        super().close()
        exposed, self._exposed = self._exposed, []
        for address in exposed:
            if self._relay is not None:
                self._relay.withdraw(address)


def _text(address: HostPort) -> str:
    return join_address("relay", *address).removeprefix("relay://")
