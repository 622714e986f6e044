"""Turns to send: bounded, fair among callers, and given back whatever happens."""

import asyncio
from collections import Counter

import pytest

from eldric.data import transfers as transfers_module
from eldric.data.transfers import Transfers
from eldric.errors import Busy


class Senders:
    """Callers that hold their turn until they are told to end."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.running: list[str] = []
        self.refused: Counter[str] = Counter()
        self._ends: dict[str, list[asyncio.Event]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, *callers: str) -> None:
        for caller in callers:
            self.tasks.append(asyncio.create_task(self._send(caller)))
            await asyncio.sleep(0)
        await settled()

    async def end(self, caller: str) -> None:
        self._ends[caller].pop(0).set()
        await settled()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _send(self, caller: str) -> None:
        end = asyncio.Event()
        try:
            async with self.transfers.turn(caller):
                self.running.append(caller)
                self._ends.setdefault(caller, []).append(end)
                await end.wait()
                self.running.remove(caller)
        except Busy:
            self.refused[caller] += 1


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_bounded_number_runs_and_waits_and_the_rest_is_refused() -> None:
    senders = Senders(Transfers(most=2, most_waiting=3))
    await senders.come(*"abcdefg")
    assert senders.running == ["a", "b"]
    assert (senders.transfers.running, senders.transfers.waiting) == (2, 3)
    assert senders.refused == Counter("fg")
    await senders.end("a")
    assert senders.running == ["b", "c"]
    await senders.close()
    assert (senders.transfers.running, senders.transfers.waiting) == (0, 0)


async def test_one_caller_gets_half_of_the_turns_at_most_and_a_free_one_goes_to_who_has_fewest() -> None:
    senders = Senders(Transfers(most=4, most_waiting=10))
    await senders.come(*"aaaaa")
    assert senders.running == ["a", "a"]
    await senders.come(*"bcb")
    assert senders.running == ["a", "a", "b", "c"]
    await senders.end("c")
    assert Counter(senders.running) == {"a": 2, "b": 2}, "a waits longer, but has more"
    await senders.end("a")
    await senders.end("b")
    assert Counter(senders.running) == {"a": 2, "b": 1}, "who has half waits, though a turn is free"
    await senders.close()


async def test_a_full_room_makes_place_for_a_caller_that_waits_less() -> None:
    senders = Senders(Transfers(most=1, most_waiting=3))
    await senders.come("x", "a", "a", "a", "b")
    assert senders.refused == Counter("a"), "the newest of a"
    await senders.come("a")
    assert senders.refused == Counter("aa")
    await senders.end("x")
    assert senders.running == ["a"]
    await senders.end("a")
    assert senders.running == ["b"]
    await senders.close()


async def test_who_leaves_while_waiting_gives_its_place_back() -> None:
    senders = Senders(Transfers(most=1, most_waiting=2))
    await senders.come("a", "b", "c")
    senders.tasks[1].cancel()
    await settled()
    assert senders.transfers.waiting == 1
    await senders.end("a")
    assert senders.running == ["c"] and senders.transfers.running == 1
    await senders.close()


async def test_a_turn_that_is_given_to_somebody_who_leaves_goes_on() -> None:
    senders = Senders(Transfers(most=1, most_waiting=2))
    await senders.come("a", "b", "c")
    senders._ends["a"].pop(0).set()
    await asyncio.sleep(0)
    senders.tasks[1].cancel()  # in the same moment in which its turn comes
    await settled()
    assert senders.running == ["c"] and senders.transfers.running == 1
    await senders.close()
    assert senders.transfers.running == 0


async def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_module, "PATIENCE_S", 0.01)
    transfers = Transfers(most=1, most_waiting=2)
    async with transfers.turn("a"):
        with pytest.raises(Busy, match="too many transfers") as caught:
            async with transfers.turn("b"):
                pass
    assert caught.value.retry_after_s == 1.0 and transfers.waiting == 0
    async with transfers.turn("b"):
        pass
