"""Which replica of a model gets the next request."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replica:
    """One ready pipeline of a model.

    others: generations that run or wait at its head and came by other routers, when it was last asked.
    own: those that this router has there now. last_pick: grows with each pick of any replica; 0 for never.
    """

    name: str
    others: int
    own: int
    last_pick: int


def by_load(replicas: Iterable[Replica]) -> list[str]:
    """The replicas' names, the one to try first first: fewest generations running and waiting, then the one that was
    picked longest ago."""
    ordered = sorted(replicas, key=lambda each: (each.others + each.own, each.last_pick, each.name))
    return [each.name for each in ordered]


def others_of(reported: int, own: int) -> int:
    """Of the generations that a head reported, those that this router did not send."""
    return max(0, reported - own)
