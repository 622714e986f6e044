"""What the control loop asks of a stage's compute thread."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from eldric.transport.base import Peer, Transport
from eldric.worker.generation import Generation


@dataclass(frozen=True, slots=True)
class Switch:
    """With what a stage goes over to other links. Those that it had stay open: the neighbours may still use them.

    `if_idle`: only while no sequence runs or waits.
    """

    receiver: Transport
    sender: Transport
    if_idle: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """Send to `next` (None in a pipeline of one stage) and take frames from the holders of `allowed` keys.

    `workers`: names of the workers of all stages, for people; may be empty. `fallback`: why the link to the next stage
    is not of a better transport. `try_s`: how long to try to reach it; 0: as long as this stage would by itself.
    """

    epoch: int
    next: Peer | None
    allowed: frozenset[str]
    workers: tuple[str, ...] = ()
    round: int = 0
    fallback: str = ""
    try_s: float = 0.0
    switch: Switch | None = None
    done: "Future[bool]" = field(default_factory=Future)  # False: not idle; fails with a TransportError


@dataclass(frozen=True, slots=True)
class Rewire:
    """Receive and send with these transports from now on; close those that are of no use any more."""

    receiver: Transport
    sender: Transport
    done: "Future[None]" = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Submit:
    generation: Generation


@dataclass(frozen=True, slots=True)
class Cancel:
    generation: Generation


@dataclass(frozen=True, slots=True)
class Degrade:
    """Another stage of the pipeline is lost: end what runs, refuse what comes."""

    message: str


@dataclass(frozen=True, slots=True)
class Shut:
    """The head: end what waits for a slot, for this reason. What runs goes on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Follow:
    """Time the steps, or stop timing them."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """End the stage, and what runs for this reason."""

    reason: str


Command = Connect | Rewire | Submit | Cancel | Degrade | Follow | Shut | Stop
