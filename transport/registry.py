"""Which transports are installed. Which one a link takes is for the controller to say, from what its ends offer.

A package adds one with an entry point in the group `eldric.transports`: the name is the scheme, the object a subclass
of eldric.transport.base.Transport. Nothing is imported before it is asked for.
"""

import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from eldric.transport.base import Transport, TransportOptions
from eldric.transport.errors import UnknownTransport

GROUP = "eldric.transports"

#: Best first. A scheme that is not named here comes after "zmq" and before "relay".
PREFERENCE = ("shm", "ucx", "zmq", "", "relay")
UNENCRYPTED = frozenset({"ucx"})  # has no encryption of its own: for networks that the operator trusts
SAME_PROCESS = frozenset({"inproc"})  # needs both ends in one process; never offered to others


def offers() -> tuple[str, ...]:
    """Schemes that this installation can talk to other processes with, best first."""
    return by_preference(name for name in _installed() if name not in SAME_PROCESS and _runs_here(name))


def by_preference(schemes: Iterable[str]) -> tuple[str, ...]:
    """Schemes without repetition, best first; those of third parties in alphabetical order."""
    unnamed = PREFERENCE.index("")
    ranks = {scheme: rank for rank, scheme in enumerate(PREFERENCE)}
    return tuple(sorted(set(schemes), key=lambda scheme: (ranks.get(scheme, unnamed), scheme)))


def load(scheme: str) -> type[Transport]:
    """The class of a scheme. Raises UnknownTransport when it is not installed, or is broken."""
    entry = _installed().get(scheme)
    if entry is None:
        raise UnknownTransport(f"no transport {scheme!r} is installed, only {_listed(_installed())}")
    try:
        found = entry.load()
    except Exception as error:  # a third party's module may fail in any way
        raise UnknownTransport(f"the transport {scheme!r} cannot be loaded from {entry.value}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Transport)):
        raise UnknownTransport(f"the transport {scheme!r} at {entry.value} is no Transport class")
    return found


def create(scheme: str, pipeline_id: str, stage: int, options: TransportOptions | None = None) -> Transport:
    """A new transport for one stage of a pipeline. Raises UnknownTransport."""
    return load(scheme)(pipeline_id, stage, options)


def _runs_here(scheme: str) -> bool:
    """Whether this system, and the packages that are installed, have what a transport of Eldric's needs."""
    if scheme == "shm":
        return hasattr(os, "memfd_create") and hasattr(os, "eventfd")
    if scheme == "ucx":
        return hasattr(os, "eventfd") and find_spec("ucxx") is not None
    return True


def _installed() -> dict[str, EntryPoint]:
    """Entry points by scheme. Where two packages claim one scheme, Eldric's own wins, else the first on the path."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: not (entry.dist and entry.dist.name == "eldric")):
        found.setdefault(entry.name, entry)
    return found


def _listed(schemes: Iterable[str]) -> str:
    return ", ".join(by_preference(schemes)) or "none"
