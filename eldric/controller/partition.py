"""Cuts a model's layers into contiguous ranges for the seats of a ring. Pure.

A seat is a place for one stage; seats of one worker are neighbours and share its room. The cut makes the slowest
stage as quick as the workers' room allows (a stage's time is the bytes that it reads for a token, times its worker's
pace), then evens the rest out.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from eldric.controller.costs import ModelShape, Options


@dataclass(frozen=True, slots=True)
class Ring:
    """Seats in ring order: the worker (a number) that each is on; of each worker the room, in bytes, and the pace: what
    reading a byte costs there."""

    seats: tuple[int, ...]
    rooms: tuple[int, ...]
    paces: tuple[int, ...]

    def pace(self, seat: int) -> int:
        return self.paces[self.seats[seat]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the layers are cut: stage i holds [bounds[i], bounds[i + 1]); `slowest`: the slowest stage's time."""

    bounds: tuple[int, ...]
    slowest: int


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The first seat for which no cut has room: what its layers [start, end) need and what its worker has left."""

    seat: int
    start: int
    end: int
    needed: int
    room: int


class Partition:
    """Cuts one model, with one set of options, for any ring."""

    def __init__(self, shape: ModelShape, options: Options) -> None:
        self._shape = shape
        self._layers = shape.layers
        self._tail_read = shape.costs.tail_bytes
        last = shape.memory(shape.layers - 1, shape.layers, options)
        first = last if shape.layers == 1 else shape.memory(0, 1, options)
        self._compute = {False: first.compute, True: last.compute}
        self._memory = [0, *accumulate(size + last.kv for size in shape.costs.layer_bytes)]
        # For a token a stage reads its layers and, as an estimate, half of one slot's cache.
        cache = last.kv // options.slots // 2
        self._reads = [0, *accumulate(size + cache for size in shape.costs.layer_bytes)]

    def fixed(self, seat: int, seats: int) -> int:
        """Bytes that the stage on a seat needs besides its layers and their KV cache."""
        is_head, is_tail = seat == 0, seat == seats - 1
        return self._shape.besides(is_head=is_head, is_tail=is_tail) + self._compute[is_tail]

    def needed(self, seat: int, seats: int, start: int, end: int) -> int:
        """Bytes that a stage needs in all."""
        return self.fixed(seat, seats) + self._memory[end] - self._memory[start]

    def total(self, seats: int) -> int:
        """Bytes that all stages of a ring need."""
        return self._memory[-1] + sum(self.fixed(seat, seats) for seat in range(seats))

    def slowest(self, ring: Ring, bounds: Sequence[int]) -> int:
        return max(self._time(ring, bounds, stage) for stage in range(len(bounds) - 1))

    def read(self, start: int, end: int) -> int:
        """Bytes that a stage of layers [start, end) reads for a token. Of the embedding the head reads but one row."""
        return self._reads[end] - self._reads[start] + (self._tail_read if end == self._layers else 0)

    def shortfall(self, ring: Ring) -> Shortfall | None:
        """Where the layers do not fit; None when they do."""
        found = self._fill(ring, self._longest(ring))
        return found if isinstance(found, Shortfall) else None

    def cut(self, ring: Ring) -> Cut | None:
        """The best cut of the layers over a ring, or None when there is no room for one."""
        best = self._fill(ring, self._longest(ring))
        if isinstance(best, Shortfall):
            return None
        low, high = 0, self.slowest(ring, best)
        while low < high:
            middle = (low + high) // 2
            found = self._fill(ring, middle)
            if isinstance(found, Shortfall):
                low = middle + 1
            else:
                best, high = found, self.slowest(ring, found)
        even = self._even_out(ring, best)
        return Cut(tuple(even), self.slowest(ring, even))

    def given(self, ring: Ring, bounds: Sequence[int]) -> Cut | None:
        """The cut at given bounds, or None when there is no room for it."""
        return Cut(tuple(bounds), self.slowest(ring, bounds)) if self.misfit(ring, bounds) is None else None

    def misfit(self, ring: Ring, bounds: Sequence[int]) -> Shortfall | None:
        """The first seat that has no room for what given bounds put there; None when all have."""
        rooms = list(ring.rooms)
        for seat, worker in enumerate(ring.seats):
            start, end = bounds[seat], bounds[seat + 1]
            needed = self.needed(seat, len(ring.seats), start, end)
            if needed > rooms[worker]:
                return Shortfall(seat, start, end, needed, rooms[worker])
            rooms[worker] -= needed
        return None

    def _time(self, ring: Ring, bounds: Sequence[int], stage: int) -> int:
        return self.read(bounds[stage], bounds[stage + 1]) * ring.pace(stage)

    def _longest(self, ring: Ring) -> int:
        """No stage takes longer."""
        return (self._reads[-1] + self._tail_read) * max(ring.paces)

    def _fill(self, ring: Ring, limit: int) -> list[int] | Shortfall:
        """Give each seat in order as many layers as it has room for and time within `limit`.

        Taking the most is never worse where all are equally fast: a seat that could take fewer leaves more to others.
        Where they are not, a heavy layer may be left to a slow seat: that costs the time of a layer at the most.
        """
        seats = len(ring.seats)
        rooms = list(ring.rooms)
        for seat, worker in enumerate(ring.seats):
            rooms[worker] -= self.fixed(seat, seats)
        bounds, left = [0], Counter(ring.seats)
        for seat, worker in enumerate(ring.seats):
            start, after = bounds[-1], seats - seat - 1
            left[worker] -= 1
            beside = left[worker]  # later stages of this worker: a layer each must stay for them
            by_room = bisect_right(self._memory, self._memory[start] + rooms[worker]) - 1 - beside
            extra = 0 if after else self._tail_read
            by_time = bisect_right(self._reads, self._reads[start] + limit // ring.pace(seat) - extra) - 1
            end = min(by_room, by_time, self._layers - after)
            if end <= start or (after == 0 and end < self._layers):
                wanted = self._layers if after == 0 else start + 1 + beside
                needed = self._memory[wanted] - self._memory[start] + self.fixed(seat, seats)
                return Shortfall(seat, start, wanted, needed, max(0, rooms[worker] + self.fixed(seat, seats)))
            rooms[worker] -= self._memory[end] - self._memory[start]
            bounds.append(end)
        return bounds

    def _even_out(self, ring: Ring, bounds: list[int]) -> list[int]:
        """Move single layers between neighbours while that makes the slower of the two quicker and they have room."""
        seats = len(ring.seats)
        rooms = list(ring.rooms)
        for seat, worker in enumerate(ring.seats):
            rooms[worker] -= self.needed(seat, seats, bounds[seat], bounds[seat + 1])
        moved = True
        while moved:
            moved = False
            for edge in range(1, seats):
                giver, taker, layer = self._better(ring, bounds, edge)
                if layer < 0:
                    continue
                size = self._memory[layer + 1] - self._memory[layer]
                here, there = ring.seats[giver], ring.seats[taker]
                if here != there:
                    if rooms[there] < size:
                        continue
                    rooms[here] += size
                    rooms[there] -= size
                bounds[edge] += 1 if taker < giver else -1
                moved = True
        return bounds

    def _better(self, ring: Ring, bounds: list[int], edge: int) -> tuple[int, int, int]:
        """Which seat at an edge should give the layer at that edge to which; layer -1 when neither gains."""
        left, right = self._time(ring, bounds, edge - 1), self._time(ring, bounds, edge)
        last, first = bounds[edge] - 1, bounds[edge]
        to_right = (self._reads[last + 1] - self._reads[last]) * ring.pace(edge)
        to_left = (self._reads[first + 1] - self._reads[first]) * ring.pace(edge - 1)
        if right + to_right < left and last > bounds[edge - 1]:
            return edge - 1, edge, last
        if left + to_left < right and first + 1 < bounds[edge + 1]:
            return edge, edge - 1, first
        return edge, edge, -1
