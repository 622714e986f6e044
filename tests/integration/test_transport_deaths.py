"""What every transport between processes does alike when peers die, freeze, or are replaced by others."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from eldric.transport.base import Link, Peer, Transport
from eldric.transport.errors import LinkClosed, PeerLost, QueueFull
from tests.transports import BETWEEN_PROCESSES, QUICK, linked, make_transport, numbered, peer_of, receive

#: A silence that no test waits for: what is noticed earlier was noticed by the connection's end.
PATIENT = replace(QUICK, silence_s=30)

pytestmark = pytest.mark.parametrize("scheme", BETWEEN_PROCESSES)


@pytest.fixture(autouse=True)
def ucx_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shared memory; test_transport_frames.py takes TCP."""
    monkeypatch.setenv("UCX_TLS", "sm,tcp")


@contextmanager
def other_process(receiver: Transport, frames: int = 3) -> Iterator[tuple["subprocess.Popen[str]", Link]]:
    """A stage 0 in another process that sends to `receiver`, and a link of `receiver` to it."""
    order = {
        "scheme": receiver.scheme,
        "address": receiver.listen(),
        "key": receiver.public_key,
        "silence_s": receiver.options.silence_s,
        "frames": frames,
    }
    command = [sys.executable, "-m", "tests.integration.transport_peer", json.dumps(order)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            receiver.allow([told["key"]])
            yield process, receiver.connect(Peer(told["address"], told["key"], 0))
        finally:
            process.kill()


def losses(transport: Transport, timeout: float) -> dict[bool, float]:
    """Seconds until each of both directions was reported, by PeerLost.inbound."""
    began = time.monotonic()
    seen: dict[bool, float] = {}
    while len(seen) < 2:
        try:
            assert transport.recv(timeout) is not None, f"only {seen} after {timeout} s"
        except PeerLost as lost:
            assert lost.stage == 0
            seen[lost.inbound] = time.monotonic() - began
    return seen


def test_killed_peer_is_noticed_at_once_in_both_directions(scheme: str) -> None:
    with (
        make_transport(scheme, 1, PATIENT) as receiver,
        other_process(receiver) as (process, link),
    ):
        assert [receive(receiver).header.step for _ in range(3)] == [0, 1, 2]
        process.send_signal(signal.SIGKILL)
        assert max(losses(receiver, 5).values()) < 0.15
        with pytest.raises(LinkClosed):
            link.send(numbered(1), timeout=5)


def test_frozen_peer_is_noticed_within_the_silence(scheme: str) -> None:
    with make_transport(scheme, 1) as receiver, other_process(receiver) as (process, link):
        assert [receive(receiver).header.step for _ in range(3)] == [0, 1, 2]
        process.send_signal(signal.SIGSTOP)
        seen = losses(receiver, 5)
        assert QUICK.silence_s / 4 < min(seen.values()) and max(seen.values()) < QUICK.silence_s + 0.3
        with pytest.raises(LinkClosed):
            link.send(numbered(1), timeout=5)


def test_frozen_peer_does_not_hold_close_up(scheme: str) -> None:
    with (
        make_transport(scheme, 1, PATIENT) as receiver,
        other_process(receiver) as (process, link),
    ):
        receive(receiver)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(QueueFull):
            for _ in range(100):
                link.send(numbered(1), bytes(1_000_000), timeout=0.1)
        began = time.monotonic()
        receiver.close()
        assert time.monotonic() - began < QUICK.linger_s + 1


def test_link_does_not_come_back_when_somebody_else_takes_the_address(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        address = receiver.listen()
        link = sender.connect(peer_of(receiver, address))
        receiver.close()
        with make_transport(scheme, 1) as next_one:
            next_one.allow([sender.public_key])
            next_one.listen("127.0.0.1", int(address.rpartition(":")[2]))
            with pytest.raises(PeerLost):
                sender.recv(5)
            with pytest.raises(LinkClosed):
                link.send(numbered(1), timeout=1)
            assert next_one.recv(0.3) is None
            assert next_one.stats.refused == 0  # it did not even try


def test_many_transports_in_one_process_keep_their_keys_apart(scheme: str) -> None:
    pairs = [linked(scheme) for _ in range(4)]
    entered = [pair.__enter__() for pair in pairs]
    for number, (_, link, receiver) in enumerate(entered):
        link.send(numbered(number))
        assert receive(receiver).header.step == number
    for pair in pairs:
        pair.__exit__(None, None, None)


def test_sender_blocked_by_a_frozen_peer_learns_of_its_death(scheme: str) -> None:
    with (
        make_transport(scheme, 1, PATIENT) as receiver,
        other_process(receiver) as (process, link),
    ):
        receive(receiver)
        process.send_signal(signal.SIGSTOP)
        with suppress(QueueFull):
            for _ in range(100):
                link.send(numbered(1), bytes(1_000_000), timeout=0.1)
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LinkClosed):
            for _ in range(100):
                link.send(numbered(1), bytes(1_000_000), timeout=5)
        assert time.monotonic() - began < 1


def test_nothing_is_left_of_a_killed_peer(scheme: str) -> None:
    def left() -> set[Path]:
        return {path for path in Path("/dev/shm").glob("*") if "eldric" in path.name or "ucx" in path.name}

    with make_transport(scheme, 1, PATIENT) as receiver:
        before = left()
        with other_process(receiver) as (process, _):
            receive(receiver)
            process.send_signal(signal.SIGKILL)
            losses(receiver, 5)
    deadline = time.monotonic() + 5
    while left() - before and time.monotonic() < deadline:
        time.sleep(0.05)  # it may be that of a test beside this one
    assert not left() - before
