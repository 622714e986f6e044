"""Rings whose links go by different transports: the same tokens, ends noticed as ever, and what links tell."""

import asyncio
import threading
import time
from itertools import product
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eldric.config import NodeConfig
from eldric.errors import NotReady, PipelineDegraded
from eldric.transport.base import Transport, TransportOptions
from eldric.transport.errors import PeerLost, TransportError
from eldric.transport.inproc import InprocTransport
from eldric.transport.registry import offers
from eldric.v1 import stage_pb2
from eldric.worker.commands import Stop
from eldric.worker.config import WorkerConfig
from eldric.worker.held_stage import HeldStage
from eldric.worker.metrics import StageCollector
from eldric.worker.ring import Ring
from eldric.worker.wiring import Wirer
from tests.models import storyteller
from tests.rings import PIPELINE, TestRing, even, ring
from tests.transports import linked, make_transport, peer_of

pytestmark = pytest.mark.timeout(60)

#: Both can be had in one process, and neither can reach the other.
SCHEMES = ("zmq", "inproc")

PROMPT = list(range(10, 40))


def held(pipeline: TestRing, index: int) -> HeldStage:
    (stage,) = pipeline.tables[index]
    return stage


def link_of(pipeline: TestRing, index: int) -> stage_pb2.LinkStatus:
    return held(pipeline, index).status().link


def state_of(pipeline: TestRing, index: int) -> "stage_pb2.StageState.ValueType":
    return held(pipeline, index).state


async def until_broken(pipeline: TestRing, index: int) -> float:
    """Seconds until a stage has noticed that a neighbour is gone."""
    began = time.monotonic()
    async with asyncio.timeout(10):
        while state_of(pipeline, index) != stage_pb2.BROKEN:
            await asyncio.sleep(0.002)
    return time.monotonic() - began


async def test_three_stages_over_any_mixture_of_links_give_the_tokens_of_one() -> None:
    async with ring(storyteller(), even(storyteller(), 1)) as alone:
        expected = await alone.generate(PROMPT, 16)
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        for round, links in enumerate(product(SCHEMES, repeat=3), 1):
            await pipeline.wire(links)
            await pipeline.connect(round)
            assert await pipeline.generate(PROMPT, 16) == expected, links
            assert tuple(link_of(pipeline, index).transport for index in range(3)) == links


async def test_many_streams_cross_a_mixed_ring_at_once() -> None:
    async with ring(storyteller(), even(storyteller(), 3), ("inproc", "zmq", "zmq"), slots=8) as pipeline:
        alone = [await pipeline.generate(PROMPT[:length], 16) for length in range(1, 13)]
        together = await asyncio.gather(*(pipeline.generate(PROMPT[:length], 16) for length in range(1, 13)))
    assert together == alone


@pytest.mark.parametrize("scheme", [scheme for scheme in ("zmq", "shm", "inproc") if scheme in (*offers(), "inproc")])
def test_a_transport_says_at_once_that_recv_has_a_loss_to_report(scheme: str) -> None:
    told = threading.Event()
    with linked(scheme) as (sender, _, receiver):
        assert sender.on_loss(told.set)
        receiver.close()
        assert told.wait(2)
        with pytest.raises(PeerLost) as caught:
            sender.recv(0)
    assert (caught.value.stage, caught.value.inbound) == (1, False)


@pytest.mark.parametrize("tells", [True, False])
def test_a_stage_that_waits_in_one_transport_hears_of_the_end_of_its_link_by_another(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that other transport notices nothing but in its own recv."""
    if not tells:
        monkeypatch.setattr(InprocTransport, "on_loss", Transport.on_loss)
    with (
        make_transport("zmq", 0) as receiver,
        make_transport("inproc", 0) as sender,
        make_transport("inproc", 1) as next_stage,
    ):
        own = Ring(receiver, 0)
        own.rewire(receiver, sender)
        next_stage.allow([sender.public_key])
        own.connect(peer_of(next_stage, next_stage.listen()), (), 1, 0, 1.0)
        assert own.receive(0.05) is None
        threading.Timer(0.1, next_stage.close).start()
        began = time.monotonic()
        with pytest.raises(PeerLost, match="stage 1 is lost"):
            while own.receive(5.0) is None:
                assert time.monotonic() - began < 1


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("busy", [False, True])
async def test_a_stage_that_ends_is_noticed_at_once_by_both_neighbours(lost: int, busy: bool) -> None:
    """Links 0 and 2 are of another transport than link 1: every stage but the last sends by another than it receives
    by, and hears of the next one's end only there."""
    async with ring(storyteller(), even(storyteller(), 3), ("inproc", "zmq", "inproc")) as pipeline:
        events = pipeline.events(PROMPT, 400)
        if busy:
            async for event in events:
                if event.delta.tokens:
                    break
        loaded = held(pipeline, lost).loaded
        assert loaded is not None
        loaded.thread.post(Stop("the test ends it"))
        took = [await until_broken(pipeline, (lost + step) % 3) for step in (1, 2)]
        assert max(took) < 0.5, took
        if busy and lost:
            with pytest.raises(PipelineDegraded, match=f"stage {lost} of 3 on worker w{lost} is gone"):
                async for _ in events:
                    pass
        await events.aclose()  # type: ignore[attr-defined]


async def test_a_link_tells_what_it_is_and_what_went_over_it() -> None:
    async with ring(storyteller(), even(storyteller(), 2), ("zmq", "inproc")) as pipeline:
        await pipeline.generate(PROMPT, 8)
        there, back = link_of(pipeline, 0), link_of(pipeline, 1)
        status = held(pipeline, 1).status()
        assert (status.endpoint.scheme, status.sender_scheme) == ("zmq", "inproc")
    assert (there.to_stage, there.transport, there.encryption) == (1, "zmq", "curve")
    assert (back.to_stage, back.transport, back.encryption) == (0, "inproc", "host")
    hidden_bytes = (len(PROMPT) + 7) * 128 * 4  # the last token need not go round
    assert there.frames >= 9 and there.bytes >= hidden_bytes
    assert back.frames >= 8 and 0 < back.bytes < there.bytes
    assert 0 < there.round_trip_ms < 1000 and back.round_trip_ms == 0
    assert not there.closed and not there.fallback


@pytest.mark.parametrize("links", [("zmq", "shm"), ("shm", "shm"), ("zmq", "zmq")])
async def test_in_a_ring_that_rests_nothing_is_under_way_and_round_trips_are_measured(links: tuple[str, str]) -> None:
    if not set(links) <= set(offers()):
        pytest.skip("there is no shared memory transport on this system")
    async with ring(storyteller(), even(storyteller(), 2), links) as pipeline:
        await pipeline.generate(PROMPT, 4)
        async with asyncio.timeout(2):
            while any(link_of(pipeline, index).queue_frames for index in range(2)):
                await asyncio.sleep(0.05)
            while not all(link_of(pipeline, index).round_trip_ms for index in range(2)):
                await asyncio.sleep(0.05)
        assert not any(link_of(pipeline, index).queue_bytes for index in range(2))


async def test_metrics_show_each_link() -> None:
    registry = CollectorRegistry()
    async with ring(storyteller(), even(storyteller(), 2), ("zmq", "inproc")) as pipeline:

        class Worker:
            def statuses(self) -> list[stage_pb2.StageStatus]:
                return [held(pipeline, index).status() for index in range(2)]

        registry.register(StageCollector(Worker()))
        await pipeline.generate(PROMPT, 4)
        text = generate_latest(registry).decode()
        frames = link_of(pipeline, 0).frames
    at = f'{{encryption="curve",pipeline="{PIPELINE}",stage="0",transport="zmq"}}'
    assert f"eldric_link_frames_total{at} {float(frames)}" in text
    assert f"eldric_link_round_trip_seconds{at}" in text and f"eldric_link_fallback{at} 0.0" in text
    assert f'eldric_link_bytes_total{{encryption="host",pipeline="{PIPELINE}",stage="1",transport="inproc"}}' in text


async def test_a_ring_goes_over_to_other_transports_and_back() -> None:
    """What is of no use any more is closed, and its end breaks nothing."""
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        expected = await pipeline.generate(PROMPT, 8)
        for round, links in enumerate([("inproc", "inproc"), ("zmq", "inproc"), ("zmq", "zmq")] * 2, 1):
            await pipeline.wire(links)
            await pipeline.connect(round)
            assert await pipeline.generate(PROMPT, 8) == expected
            assert [state_of(pipeline, index) for index in range(2)] == [stage_pb2.SERVING] * 2


async def test_a_transport_that_cannot_be_opened_leaves_its_end_as_it_was() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        request = stage_pb2.OpenLinksRequest(pipeline_id=PIPELINE, epoch=1, receive="smoke", send="mirrors")
        answer = await pipeline.tables[0].open_links(request)
        assert "no transport 'smoke' is installed" in answer.receive_problem
        assert "no transport 'mirrors' is installed" in answer.send_problem
        assert answer.endpoint == pipeline.loaded[0].endpoint
        assert await pipeline.generate(PROMPT, 4)


async def test_a_link_to_nowhere_is_given_up_after_the_time_that_was_given() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        request = stage_pb2.ConnectRequest(pipeline_id=PIPELINE, epoch=1, next_index=1, round=1, try_ms=200)
        request.next.CopyFrom(pipeline.loaded[1].endpoint)
        request.next.address = "zmq://127.0.0.1:1"
        began = time.monotonic()
        with pytest.raises(TransportError, match="nobody listens there"):
            await pipeline.tables[0].connect(request)
        assert time.monotonic() - began < 2
        assert state_of(pipeline, 0) == stage_pb2.BROKEN
        await pipeline.connect(2)
        assert await pipeline.generate(PROMPT, 4)


async def test_links_of_a_stage_that_is_being_unloaded_are_not_opened() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        stage = held(pipeline, 1)
        stage.unloading = True
        with pytest.raises(NotReady, match="being unloaded"):
            await pipeline.tables[1].open_links(
                stage_pb2.OpenLinksRequest(pipeline_id=PIPELINE, index=1, epoch=1, receive="inproc", send="inproc")
            )
        stage.unloading = False


def test_a_stage_with_far_neighbours_bears_with_their_silence_for_as_long_as_a_relay_does(tmp_path: Path) -> None:
    wirer = Wirer(WorkerConfig(NodeConfig("worker", "w", tmp_path, controllers=("127.0.0.1:1",)), silence_s=2.0))
    for far, silence_s in ((False, 2.0), (True, TransportOptions().relay_silence_s)):
        request = stage_pb2.LoadRequest(pipeline_id=PIPELINE, stage_count=2, far=far)
        opened = wirer.first(request).wiring
        other = wirer.other(opened, request, "zmq", "inproc").wiring
        assert {transport.options.silence_s for transport in other.transports} == {silence_s}
        for transport in other.transports:
            transport.close()
