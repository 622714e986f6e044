"""What can go wrong in a transport.

TransportError              .status names a gRPC code, so that services map it without knowing the class
├── CorruptFrame            bytes that are no sound frame, or a frame that must not be sent
├── QueueFull               the peer does not take frames as fast as they come; retryable
├── PeerLost                a peer vanished: it closed, died or fell silent
├── LinkClosed              the link was closed or its peer is lost; make a new one in a new epoch
├── ConnectFailed           no link could be made in time: nobody there, or not with this key
├── InvalidAddress          the text is no address of this transport
├── ListenFailed            the address cannot be listened on
├── TransportClosed         the transport was closed
└── UnknownTransport        no transport of that scheme is installed, or it cannot work here
"""


class TransportError(Exception):
    """Base of everything that a transport raises on purpose."""

    status = "INTERNAL"


class CorruptFrame(TransportError):
    """A header or payload breaks the format or its limits. Says which field and how."""

    status = "DATA_LOSS"


class QueueFull(TransportError):
    """The frame was not sent: as many as allowed are under way and the peer took none of them in time. Retryable."""

    status = "RESOURCE_EXHAUSTED"


class PeerLost(TransportError):
    """A peer of this epoch vanished. Raised once by `recv` for each link that it ends, after the frames that had come.

    stage: index of its stage. inbound: whether it sent to us (else we sent to it). public_key: its transport's key.
    """

    status = "UNAVAILABLE"

    def __init__(self, stage: int, reason: str, *, inbound: bool, public_key: str = "") -> None:
        self.stage, self.reason, self.inbound, self.public_key = stage, reason, inbound, public_key
        super().__init__(f"stage {stage} is lost: {reason}")


class LinkClosed(TransportError):
    """Nothing can be sent on this link any more. Says why."""

    status = "UNAVAILABLE"


class ConnectFailed(TransportError):
    """The peer was not reached in time, or it refused this key, or it is not the peer with the pinned key."""

    status = "UNAVAILABLE"


class InvalidAddress(TransportError):
    """The text is no address of this transport. Says what one looks like."""

    status = "INVALID_ARGUMENT"


class ListenFailed(TransportError):
    """The host is not of this machine, or the port is in use."""

    status = "UNAVAILABLE"


class TransportClosed(TransportError):
    """The transport was closed before or during the call."""

    status = "CANCELLED"


class UnknownTransport(TransportError):
    """No transport of that scheme is installed, or it cannot work here. Says why, and names what there is."""

    status = "FAILED_PRECONDITION"
