"""Which workers take the stages of a ring, and in which order: the alternatives that a plan tries. Pure."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from eldric.controller.partition import Ring

#: Part of a worker's memory that plans leave free, for what they do not count: the process, graphs, the system.
HEAD_ROOM = 0.2
DEFAULT_TRANSPORT = "zmq"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What planning knows of a worker."""

    name: str
    memory_bytes: int  # what it offers to stages in all
    used_bytes: int = 0  # what its stages hold, with those that are promised but not loaded yet
    unusable: str = ""  # why it takes no stages now; empty when it does
    protocol: int = 1
    transports: tuple[str, ...] = (DEFAULT_TRANSPORT,)  # best first
    host: str = ""  # equal for workers on one host; empty: not known
    edge_id: str = ""  # of the edge that leads to it; empty: others reach it directly
    pace: int = 1  # what reading a byte costs there, beside the other workers

    @property
    def available_bytes(self) -> int:
        """What a plan may use, head room taken off."""
        return max(0, int(self.memory_bytes * (1 - HEAD_ROOM)) - self.used_bytes)


@dataclass(frozen=True, slots=True)
class Seating:
    """The worker of each stage, in ring order; stages of one worker are neighbours."""

    workers: tuple[WorkerView, ...]

    @property
    def ring(self) -> Ring:
        workers = {worker.name: worker for worker in self.workers}
        number = {name: place for place, name in enumerate(workers)}
        return Ring(
            seats=tuple(number[worker.name] for worker in self.workers),
            rooms=tuple(worker.available_bytes for worker in workers.values()),
            paces=tuple(worker.pace for worker in workers.values()),
        )


@lru_cache(maxsize=1 << 16)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts names as people count: worker-2 before worker-10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


def roomiest(workers: Sequence[WorkerView]) -> list[WorkerView]:
    return sorted(workers, key=lambda worker: (-worker.available_bytes, natural(worker.name)))


def one_each(workers: Sequence[WorkerView], stages: int) -> list[Seating]:
    """The `stages` roomiest workers in the orders worth trying, the preferred first.

    By name, by room, and with the roomiest at the ends, where the embedding and the output matrix live.
    """
    by_room = roomiest(workers)[:stages]
    by_name = sorted(by_room, key=lambda worker: natural(worker.name))
    orders = [by_name, by_room, by_room[1:] + by_room[:1]]
    return [Seating(order) for order in dict.fromkeys(tuple(order) for order in orders)]


def shared(workers: Sequence[WorkerView], stages: int) -> Iterator[list[Seating]]:
    """Seatings of exactly `stages` stages: on as many workers as there can be, then on ever fewer that share them."""
    for count in range(min(stages, len(workers)), 0, -1):
        yield [_spread(seating.workers, stages) for seating in one_each(workers, count)]


def as_named(workers: Sequence[WorkerView], names: Sequence[str], stages: int) -> list[Seating]:
    """The one seating that keeps the names' order: the list itself when it is as long as the ring, else spread."""
    named = {worker.name: worker for worker in workers}
    if stages == len(names):
        return [Seating(tuple(named[name] for name in names))]
    ring = [named[name] for name in dict.fromkeys(names)]
    kept = set(roomiest(ring)[:stages])
    return [_spread([worker for worker in ring if worker in kept], stages)]


def by_need(workers: Sequence[WorkerView], needs: Sequence[int]) -> list[Seating]:
    """The roomiest worker for the stage that needs most, and so on; nothing with fewer workers than stages."""
    if len(workers) < len(needs):
        return []
    stages = sorted(range(len(needs)), key=lambda stage: -needs[stage])
    seats = dict(zip(stages, roomiest(workers), strict=False))
    return [Seating(tuple(seats[stage] for stage in range(len(needs))))]


def _spread(workers: Sequence[WorkerView], stages: int) -> Seating:
    """As even as it goes, neighbours together: five stages on two workers are a a a b b."""
    return Seating(tuple(workers[stage * len(workers) // stages] for stage in range(stages)))
