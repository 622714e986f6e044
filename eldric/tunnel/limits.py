"""Bounds of a tunnel, which both ends keep, and the times at which it counts as broken."""

from dataclasses import dataclass

from eldric.errors import InvalidRequest

#: Part of the contract: most bytes of one ChannelData, and of a channel that its receiver has not passed on.
PIECE_BYTES = 128 * 1024
WINDOW_BYTES = 1 << 20
#: Longest address or reason in a message, in characters.
MAX_TEXT = 512


class TunnelViolation(InvalidRequest):
    """The other side broke the rules of the tunnel's contract: nothing it says counts any more."""


@dataclass(frozen=True, slots=True)
class TunnelLimits:
    """What one tunnel may take."""

    channels: int = 256  # at once, by either side
    ports: int = 64  # exposed at once
    port_channels: int = 96  # at once by one exposed port: whoever floods it leaves room for the others
    kept_bytes: int = 32 << 20  # sent and not acknowledged: beyond it, channels are not read
    held_bytes: int = 32 << 20  # came and not passed on yet: the channel that brings more is ended
    kept_messages: int = 1 << 16  # beyond it, the other side is taken for one that never acknowledges


@dataclass(frozen=True, slots=True)
class TunnelTimes:
    """In seconds."""

    pulse_s: float = 0.5  # something is sent at least so often
    silence_s: float = 1.5  # a stream that brings nothing for so long is broken
    gap_s: float = 5.0  # a session without a stream is over after that
    connect_s: float = 2.0  # until the edge's welcome
    retry_s: float = 0.1  # between two tries to come back
    max_retry_s: float = 0.5
