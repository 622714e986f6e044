"""The numbered messages of a session: which came, and which must be kept in case that they did not arrive."""

from eldric.tunnel.limits import TunnelViolation
from eldric.v1 import tunnel_pb2

#: What a kept message counts for, beside its data.
OVERHEAD_BYTES = 64


def weight(message: tunnel_pb2.TunnelMessage) -> int:
    """Bytes that a kept message counts for."""
    return OVERHEAD_BYTES + len(message.data.data)


class Ledger:
    """Numbers what is sent, keeps it until it is acknowledged, and repeats it on a new stream."""

    def __init__(self) -> None:
        #: The highest number that came.
        self.received = 0
        self.kept_bytes = 0
        #: Of kept_bytes, what the stream of now has not taken yet.
        self.unsent_bytes = 0
        self._kept: dict[int, tunnel_pb2.TunnelMessage] = {}  # in order
        self._last = 0  # number given last
        self._next = 1  # number to be sent next
        self._acknowledged = 0

    @property
    def kept_messages(self) -> int:
        return len(self._kept)

    def add(self, message: tunnel_pb2.TunnelMessage) -> None:
        """A message to be sent, after all others."""
        self._last += 1
        message.number = self._last
        self._kept[self._last] = message
        self.kept_bytes += weight(message)
        self.unsent_bytes += weight(message)

    def next(self) -> tunnel_pb2.TunnelMessage | None:
        """The message to be sent now, with what is acknowledged by it; None when all were."""
        message = self._kept.get(self._next)
        if message is not None:
            self._next += 1
            self.unsent_bytes -= weight(message)
            message.received = self.received
        return message

    def acknowledge(self, number: int) -> None:
        """The other side has everything up to that number. Raises TunnelViolation when it cannot have."""
        if number > self._last:
            raise TunnelViolation(f"message {number} is acknowledged, {self._last} were sent")
        for each in range(self._acknowledged + 1, number + 1):
            self.kept_bytes -= weight(self._kept.pop(each))
        self._acknowledged = max(self._acknowledged, number)

    def resume(self, number: int) -> None:
        """A new stream, whose other side has everything up to that number. Raises TunnelViolation."""
        if number < self._acknowledged:
            raise TunnelViolation(f"message {number} is said to be the last that came, {self._acknowledged} did before")
        self.acknowledge(number)
        self._next, self.unsent_bytes = number + 1, self.kept_bytes

    def accept(self, number: int) -> bool:
        """Whether a message that came is new. Raises TunnelViolation when some before it did not come."""
        if number > self.received + 1:
            raise TunnelViolation(f"message {number} after {self.received}")
        if number <= self.received:
            return False
        self.received = number
        return True
