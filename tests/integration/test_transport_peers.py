"""What every transport does alike with its peers: whom it lets in, who is lost, and in which epoch."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from eldric.transport.errors import (
    ConnectFailed,
    LinkClosed,
    PeerLost,
)
from tests.transports import EVERY_TRANSPORT, QUICK, SHORT, fill, linked, make_transport, numbered, peer_of, receive

pytestmark = pytest.mark.parametrize("scheme", EVERY_TRANSPORT)


@pytest.fixture(autouse=True)
def ucx_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shared memory; test_transport_frames.py takes TCP."""
    monkeypatch.setenv("UCX_TLS", "sm,tcp")


def test_closed_sender_is_lost_after_its_frames(scheme: str) -> None:
    options = replace(QUICK, linger_s=20)
    with linked(scheme, options) as (sender, link, receiver), ThreadPoolExecutor(1) as pool:
        for number in range(5):
            link.send(numbered(number), bytes(50_000))
        key = sender.public_key
        closing = pool.submit(sender.close)
        assert [receive(receiver).header.step for _ in range(5)] == list(range(5))
        with pytest.raises(PeerLost) as lost:
            receiver.recv(5)
        assert (lost.value.stage, lost.value.inbound, lost.value.public_key) == (0, True, key)
        closing.result(timeout=5)  # as soon as all was taken
        assert receiver.recv(SHORT) is None  # reported once
        assert receiver.stats.peers == 0


def test_frames_that_were_sent_before_a_close_arrive_though_the_sender_heard_nothing(scheme: str) -> None:
    with linked(scheme, replace(QUICK, linger_s=20)) as (sender, link, receiver), ThreadPoolExecutor(1) as pool:
        link.send(numbered(0), timeout=5)
        receive(receiver)  # its whole window is known from here on
        for number in range(1, 60):
            link.send(numbered(number), timeout=5)
        for _ in range(1, 55):
            receive(receiver)  # which grants now and then; the sender has not read that when it closes
        closing = pool.submit(sender.close)
        assert [receive(receiver).header.step for _ in range(5)] == list(range(55, 60))
        with pytest.raises(PeerLost):
            receiver.recv(5)
        closing.result(timeout=5)


def test_close_waits_no_longer_than_it_may_for_a_receiver_that_takes_nothing(scheme: str) -> None:
    with linked(scheme, replace(QUICK, linger_s=0.3)) as (sender, link, receiver):
        for number in range(5):
            link.send(numbered(number), bytes(50_000))
        began = time.monotonic()
        sender.close()
        assert time.monotonic() - began < 1
        assert [receive(receiver).header.step for _ in range(5)] == list(range(5))  # they had left nevertheless


def test_neighbours_that_close_at_once_do_not_wait_for_each_other(scheme: str) -> None:
    options = replace(QUICK, linger_s=20)
    with make_transport(scheme, 0, options) as left, make_transport(scheme, 1, options) as right:
        left.allow([right.public_key])
        right.allow([left.public_key])
        for link in (left.connect(peer_of(right, right.listen())), right.connect(peer_of(left, left.listen()))):
            for number in range(5):
                link.send(numbered(number), bytes(50_000))
        with ThreadPoolExecutor(2) as pool:
            for closing in [pool.submit(transport.close) for transport in (left, right)]:
                closing.result(timeout=5)


def test_closed_receiver_is_lost_and_its_link_dead(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        key = receiver.public_key
        receiver.close()
        with pytest.raises(PeerLost) as lost:
            sender.recv(5)
        assert (lost.value.stage, lost.value.inbound, lost.value.public_key) == (1, False, key)
        assert sender.recv(SHORT) is None
        with pytest.raises(LinkClosed, match="stage 1"):
            link.send(numbered(1), timeout=5)
        assert link.closed is not None


def test_sender_blocked_at_a_full_queue_learns_of_the_loss(scheme: str) -> None:
    with linked(scheme, replace(QUICK, queue_frames=8)) as (_, link, receiver), ThreadPoolExecutor(1) as pool:
        fill(link)
        blocked = pool.submit(link.send, numbered(99), b"", 10)
        receiver.close()
        began = time.monotonic()
        with pytest.raises(LinkClosed):
            blocked.result(timeout=10)
        assert time.monotonic() - began < 1


def test_closed_link_sends_nothing_more(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        link.send(numbered(1))
        link.close()
        link.close()
        with pytest.raises(LinkClosed, match="closed by this end"):
            link.send(numbered(2))
        assert receive(receiver).header.step == 1
        with pytest.raises(PeerLost):
            receiver.recv(5)
        assert sender.recv(SHORT) is None  # its own doing is no loss


def test_new_link_after_a_closed_one_works(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        for number in range(3):
            link = sender.connect(peer)
            link.send(numbered(number))
            assert receive(receiver).header.step == number
            link.close()
            with pytest.raises(PeerLost):
                receiver.recv(5)


def test_good_link_to_the_same_peer_is_given_again(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        link = sender.connect(peer)
        assert sender.connect(peer) is link
        link.close()
        assert sender.connect(peer) is not link


def test_peer_that_is_not_allowed_gets_nowhere(scheme: str) -> None:
    with make_transport(scheme, 0) as stranger, make_transport(scheme, 1) as receiver:
        address = receiver.listen()
        with pytest.raises(ConnectFailed, match="does not allow this transport's key"):
            stranger.connect(peer_of(receiver, address), timeout=0.3)
        receiver.allow(["another key"])
        with pytest.raises(ConnectFailed, match="does not allow this transport's key"):
            stranger.connect(peer_of(receiver, address), timeout=0.3)
        assert receiver.recv(SHORT) is None
        assert receiver.stats.peers == 0


def test_peer_with_another_key_than_the_pinned_one_is_not_spoken_to(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as impostor, make_transport(scheme, 1) as real:
        impostor.allow([sender.public_key])
        address = impostor.listen()
        with pytest.raises(ConnectFailed, match="does not hold the expected key"):
            sender.connect(peer_of(real, address), timeout=0.3)
        assert impostor.recv(SHORT) is None


def test_connect_waits_for_a_peer_that_comes_late(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver, ThreadPoolExecutor(1) as pool:
        address = receiver.listen()
        connecting = pool.submit(sender.connect, peer_of(receiver, address), 10)
        with pytest.raises(TimeoutError):
            connecting.result(timeout=0.2)
        receiver.allow([sender.public_key])  # from another thread than the one that connects
        connecting.result(timeout=5).send(numbered(1))
        assert receive(receiver).header.step == 1


def test_nobody_at_the_address_is_said(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as gone:
        address = gone.listen()
        peer = peer_of(gone, address)
        gone.close()
        with pytest.raises(ConnectFailed, match=r"stage 1 at .* nobody listens there"):
            sender.connect(peer, timeout=0.3)


def test_key_that_is_not_allowed_any_more_is_cut_off(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        link.send(numbered(1))
        assert receive(receiver).header.step == 1
        receiver.allow([])
        link.send(numbered(2))
        assert receiver.recv(0.2) is None
        assert receiver.stats.dropped["unknown_peer"] == 1
        sender.close()
        assert receiver.recv(0.2) is None  # and its end is nobody's business


def test_link_of_another_pipeline_is_refused(scheme: str) -> None:
    with make_transport(scheme, 0, pipeline="another") as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        link = sender.connect(peer_of(receiver, receiver.listen()))
        assert receiver.recv(SHORT) is None
        with pytest.raises(LinkClosed, match="refused the link: pipeline 'another'"):
            for _ in range(20):
                link.send(numbered(1), timeout=1)
        assert receiver.recv(SHORT) is None
        assert receiver.stats.refused == 1


def test_stale_epoch_is_dropped_and_a_newer_one_waits(scheme: str) -> None:
    with linked(scheme) as (sender, link, receiver):
        receiver.set_epoch(2)
        link.send(numbered(1))
        assert receiver.recv(0.2) is None
        assert receiver.stats.dropped["stale_epoch"] == 1
        sender.set_epoch(3)
        link.send(numbered(2))
        assert receiver.recv(0.2) is None
        receiver.set_epoch(3)
        link.send(numbered(3))
        assert [receive(receiver).header.step, receive(receiver).header.step] == [2, 3]


def test_end_of_a_neighbour_that_left_the_ring_is_not_reported(scheme: str) -> None:
    with linked(scheme) as (first, _, leaving), make_transport(scheme, 2) as last:
        last.allow([first.public_key])
        first.set_epoch(2)
        link = first.connect(peer_of(last, last.listen()))
        leaving.close()
        assert first.recv(0.2) is None
        last.set_epoch(2)
        link.send(numbered(1))
        assert receive(last).header.step == 1


def test_link_of_an_older_epoch_may_end_unnoticed(scheme: str) -> None:
    with linked(scheme) as (sender, _, receiver):
        assert receiver.recv(SHORT) is None
        receiver.set_epoch(2)
        sender.close()
        assert receiver.recv(0.2) is None
        assert receiver.stats.peers == 0


def test_link_that_goes_on_in_a_new_epoch_is_missed_when_it_ends(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        peer = peer_of(receiver, receiver.listen())
        link = sender.connect(peer)
        for epoch in (2, 3, 4):
            receiver.set_epoch(epoch)
            sender.set_epoch(epoch)
            assert sender.connect(peer) is link
            assert receiver.recv(SHORT) is None
        link.send(numbered(1))
        assert receive(receiver).header.epoch == 4
        sender.close()
        with pytest.raises(PeerLost):
            receiver.recv(5)


def test_loss_in_an_epoch_that_is_still_to_come_waits_for_it(scheme: str) -> None:
    with make_transport(scheme, 0) as sender, make_transport(scheme, 1) as receiver:
        receiver.allow([sender.public_key])
        sender.set_epoch(2)
        sender.connect(peer_of(receiver, receiver.listen())).send(numbered(1))
        sender.close()
        assert receiver.recv(0.2) is None
        receiver.set_epoch(2)
        assert receive(receiver).header.step == 1
        with pytest.raises(PeerLost):
            receiver.recv(5)


def test_link_that_no_epoch_asked_for_is_closed(scheme: str) -> None:
    with linked(scheme) as (sender, link, _):
        sender.set_epoch(2)
        assert link.closed is None  # connect may still ask for it
        sender.set_epoch(3)
        assert link.closed is not None
