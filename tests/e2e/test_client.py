"""The Python client, sync and async, against a real cluster."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from eldric.client import (
    Answer,
    AsyncClient,
    Client,
    Cluster,
    Delta,
    Finished,
    PipelineInfo,
    Plan,
    StageProgress,
    Started,
    collect,
)
from eldric.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from tests.e2e import conftest
from tests.e2e.cli import wait_for
from tests.e2e.conftest import STORY

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(cluster: conftest.Cluster) -> Iterator[Client]:
    with Client(folder=cluster.folder) as made:
        yield made


def test_a_generation_is_a_stream_of_typed_events(client: Client) -> None:
    first, *deltas, last = client.generate(STORY, "Once upon a time", **GREEDY)
    assert isinstance(first, Started)
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens) == ("length", 12)
    assert first.prompt_tokens == last.prompt_tokens
    pieces = [delta for delta in deltas if isinstance(delta, Delta)]
    assert len(pieces) == len(deltas)
    tokens = [token for delta in pieces for token in delta.tokens]
    assert len(tokens) == 12
    assert b"".join(token.text for token in tokens).decode() == "".join(delta.text for delta in pieces)


def test_sync_and_async_give_the_same(client: Client, cluster: conftest.Cluster) -> None:
    async def ask() -> tuple[Answer, Answer, list[int]]:
        async with AsyncClient(folder=cluster.folder) as other:
            chat, complete, ids = await asyncio.gather(
                collect(other.chat(STORY, HELLO, **GREEDY)),
                other.complete(STORY, "Once", **GREEDY),
                other.tokenize(STORY, "Once upon a time"),
            )
            return chat, complete, ids

    chat, complete, ids = asyncio.run(ask())
    assert client.complete(STORY, "Once", **GREEDY).tokens == complete.tokens
    text = "".join(event.text for event in client.chat(STORY, HELLO, **GREEDY) if isinstance(event, Delta))
    assert text == chat.text
    assert client.tokenize(STORY, "Once upon a time") == ids
    assert client.complete(STORY, ids, **GREEDY).text == client.complete(STORY, "Once upon a time", **GREEDY).text


def test_logprobs(client: Client) -> None:
    answer = client.complete(STORY, "Once", logprobs=3, **GREEDY)
    for token in answer.tokens:
        assert token.logprob is not None
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)


def test_a_deployment_is_a_stream_of_typed_events(client: Client) -> None:
    try:
        events = list(client.deploy_events(STORY, name="typed", stages=2, context=256, slots=1))
        assert isinstance(events[0], Plan)
        assert isinstance(events[-1], PipelineInfo)
        assert all(isinstance(event, StageProgress) for event in events[1:-1])
        assert events[-1].options["context"] == 256
    finally:
        client.undeploy("typed")
    with pytest.raises(NotFound):
        client.status("typed")


def test_leaving_a_deployment_undoes_it(client: Client) -> None:
    events = client.deploy_events(STORY, name="left", stages=1, context=100_000)
    assert isinstance(next(events), Plan)
    events.close()
    wait_for(lambda: "left" not in [info.name for info in client.status()])


def slots_used(client: Client) -> int:
    return client.status(STORY)[0].slots_used


def test_leaving_a_generation_frees_its_slot(client: Client) -> None:
    events = client.generate(STORY, "Once", ignore_eos=True)
    assert isinstance(next(events), Started)
    assert isinstance(next(events), Delta)
    events.close()
    wait_for(lambda: slots_used(client) == 0)


def test_loops_that_end_one_after_the_other_leave_nothing_for_the_next(
    client: Client, cluster: conftest.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams that were left early end with their client, not in some other loop once theirs is closed."""

    async def leave() -> None:
        async with AsyncClient(folder=cluster.folder) as other:
            async for event in other.generate(STORY, "Once", ignore_eos=True, max_tokens=30):
                if isinstance(event, Delta):
                    return

    for _ in range(20):
        asyncio.run(leave())
        client.status()
    wait_for(lambda: slots_used(client) == 0)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_closing_the_client_ends_what_was_left_behind(cluster: conftest.Cluster) -> None:
    with Client(folder=cluster.folder) as other:
        events = other.generate(STORY, "Once", ignore_eos=True)
        next(events)
    with Client(folder=cluster.folder) as client:
        wait_for(lambda: slots_used(client) == 0)
    assert [thread.name for thread in threading.enumerate() if thread.name == "eldric-client"] == []


def test_threads_share_a_client(client: Client) -> None:
    expected = client.complete(STORY, "Once", **GREEDY).tokens
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.complete(STORY, "Once", **GREEDY).tokens, range(24)))
    assert answers == [expected] * 24


def test_a_deadline(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        list(client.generate(STORY, "Once", ignore_eos=True, timeout_s=0.05))
    wait_for(lambda: slots_used(client) == 0)


def test_errors_are_typed(client: Client) -> None:
    with pytest.raises(NotFound):
        client.complete("nope", "Once")
    with pytest.raises(NotFound):
        client.models.show("nope")
    with pytest.raises(InvalidRequest, match="temperature"):
        client.complete(STORY, "Once", temperature=-1.0)
    with pytest.raises(InvalidRequest, match="no option 'colour'"):
        client.complete(STORY, "Once", colour="red")
    with pytest.raises(InvalidRequest, match="stages"):
        client.deploy(STORY, name="x", stages="many")
    with pytest.raises(InvalidRequest, match="role"):
        list(client.chat(STORY, [{"content": "Hello"}]))
    with pytest.raises(InvalidRequest, match="token ids"):
        client.complete(STORY, ["Once"])  # type: ignore[list-item]


def test_the_next_controller_is_asked_when_one_is_gone(cluster: conftest.Cluster) -> None:
    known = Cluster.load(cluster.folder / "cluster.json")
    several = Cluster(("127.0.0.1:1", *known.controllers), known.operator)
    with Client(several) as client:
        assert STORY in [info.name for info in client.status()]
    with Client(Cluster(("127.0.0.1:1", "127.0.0.1:2"), known.operator)) as client:
        with pytest.raises(Unavailable, match=r"no controller answers at 127\.0\.0\.1:1, 127\.0\.0\.1:2"):
            client.status()
        with pytest.raises(Unavailable):
            client.complete(STORY, "Once")
    gone = Client(Cluster(("127.0.0.1:1",), known.operator))
    with gone, pytest.raises(Unavailable, match="the controller cannot be reached"):
        gone.nodes()
