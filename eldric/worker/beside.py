"""Transports that are opened and connected beside those that a stage uses, so that it can go over to them at once."""

from collections.abc import Collection
from dataclasses import dataclass

from eldric.transport.base import Peer
from eldric.worker.ring import frame_epoch
from eldric.worker.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Beside:
    """`wiring`: what the stage may go over to. `used`: what it had when that was opened; an end that both have in
    common stays as it is."""

    wiring: Wiring
    used: Wiring

    def connect(self, peer: Peer | None, allowed: Collection[str], epoch: int, round: int, timeout_s: float) -> None:
        """Let the stage before in, and reach the next one, with what is not in use. Not in the compute thread.

        allowed: keys by which the stage before sends now, and will. Raises TransportError.
        """
        receiver, sender = self.wiring.receiver, self.wiring.sender
        receiver.allow(allowed)
        for transport in self.wiring.transports:
            if transport not in self.used.transports:
                if transport is not receiver:
                    transport.allow(())
                transport.set_epoch(frame_epoch(epoch, round))
        if peer is not None and sender not in self.used.transports:
            sender.connect(peer, timeout_s)

    def close(self, in_use: Wiring) -> None:
        """Close what is not in use now. May take a while."""
        for transport in {*self.wiring.transports, *self.used.transports} - set(in_use.transports):
            transport.close()
