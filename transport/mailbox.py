"""Where frames of all inbound wires come to, and the one place to wait at. What wired.py needs of shm and ucx."""

from abc import ABC, abstractmethod
from typing import TypeAlias

from eldric.transport.opening import Wire

FRAME = 1
HELLO = 2  # the link goes on in a new epoch; the second part is a LinkHello
CORRUPT = 3  # no message of this protocol
END = 4  # nothing will follow
NOTHING = memoryview(b"")

#: What came by a wire: one of the above, and its parts: a frame's header or a hello; a frame's payload.
Arrival: TypeAlias = tuple[int, Wire, bytes, memoryview]


class Mailbox(ABC):
    """`ring` and `expect` may be called from any thread, all else by the transport's. `sleep` alone blocks for long."""

    address: bytes = b""  # where peers reach it, beside the door; empty: not needed

    def expect(self, wire: Wire) -> None:
        """An inbound wire has opened; `add` follows. Called by the door's threads."""
        return

    @abstractmethod
    def add(self, wire: Wire) -> None:
        """Take frames of an inbound wire. Raises CorruptFrame for one that is not as it should be."""

    @abstractmethod
    def remove(self, wire: Wire) -> None:
        """Take nothing more of it, and let go of what belongs to it."""

    @abstractmethod
    def sleep(self, timeout_s: float | None) -> None:
        """Until there is something to take or the bell is rung; it is heard then."""

    @abstractmethod
    def take(self) -> Arrival | None:
        """The next arrival, if there is one."""

    def take_last(self) -> Arrival | None:
        """As `take`, when a wire has ended: None only if nothing more of it can come."""
        return self.take()

    @abstractmethod
    def tell(self, wire: Wire, grant: bytes) -> None:
        """Send a serialized LinkGrant back. One that cannot go out is lost; the next makes up for it."""

    @abstractmethod
    def ring(self) -> None:
        """End the current `sleep`, or else the next one."""

    @abstractmethod
    def close(self) -> None: ...
