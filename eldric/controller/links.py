"""By which transport each link goes: the best that both its ends offer, the next best where that fails. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eldric.errors import NotReady, Unavailable

#: What an operator says who leaves the choice to the cluster.
AUTO = "auto"

#: Schemes of transports that need both ends on one host. Others reach any worker.
SAME_HOST = frozenset({"shm"})

#: The scheme that leads through an edge: of use only where one end is behind one, unless an operator wants it.
RELAY = "relay"


class End(Protocol):
    """What the choice needs to know of a worker; a planner's WorkerView has it."""

    @property
    def name(self) -> str: ...
    @property
    def transports(self) -> tuple[str, ...]:
        """Best first."""

    @property
    def host(self) -> str:
        """Equal for workers on one host; empty: not known."""

    @property
    def edge_id(self) -> str:
        """The edge that leads to it; empty: others reach it directly."""


@dataclass(frozen=True, slots=True)
class LinkChoice:
    """The scheme that a link goes by now, those that it may fall back to, and why it has fallen back so far."""

    scheme: str
    others: tuple[str, ...] = ()  # best first
    fallback: str = ""  # for people: "ucx failed: ..."; empty: nothing better failed

    def failed(self, reason: str) -> "LinkChoice":
        """The next choice. Raises Unavailable, with the reasons so far, when there is none."""
        failures = "; ".join(filter(None, (self.fallback, f"{self.scheme} failed: {reason}")))
        if self.others:
            return LinkChoice(self.others[0], self.others[1:], failures)
        raise Unavailable(failures if self.fallback else reason)

    def resumed(self, scheme: str, fallback: str) -> "LinkChoice":
        """This choice for a link that goes by `scheme` already; unchanged when that may not be any more."""
        schemes = (self.scheme, *self.others)
        if scheme not in schemes:
            return self
        place = schemes.index(scheme)
        return LinkChoice(
            scheme, (*schemes[place + 1 :], *(each for each in schemes[:place] if each == RELAY)), fallback
        )


def better_choices(ends: Sequence[End], wanted: str, schemes: Sequence[str]) -> tuple[LinkChoice, ...]:
    """For links that go by these schemes: everything better that they might go by, best first, and then what they have.

    See `ring_choices`.
    """
    choices = []
    for index, scheme in enumerate(schemes):
        usable = alternatives(ends[index], ends[(index + 1) % len(ends)], wanted)
        best, *others = usable[: usable.index(scheme) + 1] if scheme in usable else (scheme,)
        choices.append(LinkChoice(best, tuple(others)))
    return tuple(choices)


def ring_choices(ends: Sequence[End], wanted: str = "") -> tuple[LinkChoice, ...]:
    """The first choice of every link: entry i is that from stage i to the next. None for a single stage.

    wanted: the one scheme that every link must take; empty or "auto": the best that a link's ends have in common, but
    to a worker behind an edge the way through that, as others are likely to fail, and slowly. Raises NotReady when a
    link has none.
    """
    if len(ends) < 2:
        return ()
    choices = []
    for index, sender in enumerate(ends):
        receiver = ends[(index + 1) % len(ends)]
        schemes = alternatives(sender, receiver, wanted)
        if RELAY in schemes and receiver.edge_id and not _same_host(sender, receiver):
            schemes = (RELAY, *(scheme for scheme in schemes if scheme != RELAY))
        choices.append(LinkChoice(schemes[0], schemes[1:]))
    return tuple(choices)


def far_stages(ends: Sequence[End]) -> tuple[bool, ...]:
    """Whether a link of a stage, by index, leads to or from a worker behind an edge on another host."""
    links = []
    for index, sender in enumerate(ends):
        receiver = ends[(index + 1) % len(ends)]
        links.append(bool(sender.edge_id or receiver.edge_id) and not _same_host(sender, receiver))
    return tuple(links[index - 1] or link for index, link in enumerate(links))


def alternatives(sender: End, receiver: End, wanted: str = "") -> tuple[str, ...]:
    """The schemes that a link may go by, best first. Raises NotReady when there is none. See `ring_choices`."""
    same_host = _same_host(sender, receiver)
    common = [scheme for scheme in sender.transports if scheme in receiver.transports]
    if wanted in ("", AUTO):
        wishes = [scheme for scheme in common if scheme != RELAY or sender.edge_id or receiver.edge_id]
    else:
        wishes = [scheme for scheme in common if scheme == wanted]
    usable = [scheme for scheme in wishes if same_host or scheme not in SAME_HOST]
    if usable:
        return tuple(usable)
    if wishes:
        raise NotReady(f"{sender.name} and {receiver.name} are not on one host, which {', '.join(wishes)} needs")
    offers = "; ".join(f"{end.name}: {', '.join(end.transports) or 'none'}" for end in (sender, receiver))
    what = "" if wanted in ("", AUTO) else f" {wanted!r}"
    raise NotReady(f"the workers have no tensor transport{what} in common ({offers})")


def _same_host(a: End, b: End) -> bool:
    return a.name == b.name or (bool(a.host) and a.host == b.host)
