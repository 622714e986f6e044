"""A router's Inference service over gRPC: text, conversations and token ids, as the Python client asks for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from eldric.channels import call_errors, channel
from eldric.errors import InvalidRequest, NotFound, PermissionDenied, QueueIsFull, Unavailable
from eldric.v1 import inference_pb2, inference_pb2_grpc, pipeline_pb2
from tests.fake_cluster import STORY, FakeCluster, fake_cluster


@contextlib.asynccontextmanager
async def stub_of(cluster: FakeCluster, kind: str = "client") -> AsyncIterator[Any]:
    identity = cluster.authority.issue_identity(kind, "someone")
    async with channel(cluster.router.node.grpc_address, identity, "router", "r1") as made:
        yield inference_pb2_grpc.InferenceStub(made)


async def generate(stub: Any, **fields: Any) -> list[inference_pb2.GenerateEvent]:
    request = inference_pb2.GenerateRequest(**({"model": "storyteller"} | fields))
    with call_errors("the router"):
        return [event async for event in stub.Generate(request)]


def text_of(events: list[inference_pb2.GenerateEvent]) -> str:
    return "".join(event.delta.text for event in events)


async def test_a_prompt_is_continued_as_it_is(cluster: FakeCluster) -> None:
    async with stub_of(cluster) as stub:
        started, *deltas, finished = await generate(stub, prompt="A dog", request_id="mine", max_tokens=5)
    assert (started.started.request_id, started.started.prompt_tokens) == ("mine", 1 + len(cluster.words("A dog")))
    assert list(cluster.head.requests[0].tokens.ids) == [cluster.tokenizer.bos_id, *cluster.words("A dog")]
    tokens = [token for event in deltas for token in event.delta.tokens]
    assert [token.id for token in tokens] == cluster.words(STORY)[:5]
    assert b"".join(token.text for token in tokens).decode() == text_of(deltas)
    assert not tokens[0].HasField("logprob")
    assert finished.finished.reason == inference_pb2.LENGTH
    assert finished.finished.usage.completion_tokens == 5
    assert finished.finished.timings.generation_ms == 3


async def test_a_conversation_is_rendered(cluster: FakeCluster) -> None:
    messages = [inference_pb2.ChatMessage(role="user", content="Hi")]
    async with stub_of(cluster) as stub:
        events = await generate(stub, chat=inference_pb2.ChatMessages(messages=messages))
    assert text_of(events) == STORY
    prompt = cluster.tokenizer.decode(cluster.head.requests[0].tokens.ids, special=True)
    assert prompt.endswith("<|user|>\nHi<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize(("begun", "ends"), [("Once", "\nOnce"), ("", "<|assistant|>\n<|end|>\n<|assistant|>\n")])
async def test_an_answer_that_was_begun_is_continued(cluster: FakeCluster, begun: str, ends: str) -> None:
    said = inference_pb2.ChatMessage(role="assistant", content=begun)
    messages = [inference_pb2.ChatMessage(role="user", content="Hi"), said]
    async with stub_of(cluster) as stub:
        assert text_of(await generate(stub, chat=inference_pb2.ChatMessages(messages=messages))) == STORY
    assert cluster.tokenizer.decode(cluster.head.requests[0].tokens.ids, special=True).endswith(ends)


async def test_token_ids_go_through_as_they_are(cluster: FakeCluster) -> None:
    async with stub_of(cluster) as stub:
        await generate(stub, tokens=inference_pb2.TokenIds(ids=[5, 6, 7]), stop_tokens=[9], ignore_eos=True)
        await generate(stub, tokens=inference_pb2.TokenIds(ids=[5, 6, 7]), stop_tokens=[9])
    assert list(cluster.head.requests[0].tokens.ids) == [5, 6, 7]
    assert list(cluster.head.requests[0].stop_tokens) == [9]
    assert list(cluster.head.requests[1].stop_tokens) == sorted({9, *cluster.tokenizer.eog_ids})


async def test_stop_strings_and_logprobs(cluster: FakeCluster) -> None:
    async with stub_of(cluster) as stub:
        sampling = {"logprobs": 2, "temperature": 0}
        events = await generate(stub, prompt="A", stop=["little", "zzz"], sampling=sampling)
    finished = events[-1].finished
    assert (text_of(events), finished.reason, finished.stop) == (
        "Once upon a time there was a ",
        inference_pb2.STOP,
        "little",
    )
    tokens = [token for event in events for token in event.delta.tokens]
    assert finished.usage.completion_tokens == len(tokens)
    assert tokens[0].logprob == -0.5
    assert [top.token for top in tokens[0].top] == [tokens[0].id, tokens[0].id + 1]
    assert tokens[0].top[0].text == tokens[0].text
    assert cluster.head.requests[0].sampling.temperature == 0


async def test_text_goes_to_ids_and_back(cluster: FakeCluster) -> None:
    async with stub_of(cluster) as stub:
        ids = (await stub.Tokenize(inference_pb2.TokenizeRequest(model="storyteller", text=STORY))).ids
        assert list(ids) == [cluster.tokenizer.bos_id, *cluster.words(STORY)]
        request = inference_pb2.TokenizeRequest(model="storyteller", text="<|end|>", special=True, add_bos=False)
        assert list((await stub.Tokenize(request)).ids) == [4]
        back = inference_pb2.DetokenizeRequest(model="storyteller", ids=cluster.words(STORY))
        assert (await stub.Detokenize(back)).text == STORY


async def test_cancel_reaches_every_head(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, heads=("w1", "w2")) as cluster, stub_of(cluster) as stub:
        await cluster.put(cluster.info("second", "w2"))
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="x"))).cancelled
        assert [head.cancels for head in cluster.heads.values()] == [["x"], ["x"]]
        for head in cluster.heads.values():
            head.reason = inference_pb2.CANCELLED
        events = await generate(stub, prompt="A")
        assert events[-1].finished.reason == inference_pb2.CANCELLED


async def test_a_caller_that_goes_away_cancels(cluster: FakeCluster) -> None:
    async def silent(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        await asyncio.Event().wait()
        yield inference_pb2.Delta()

    cluster.head.say = silent
    async with stub_of(cluster) as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(model="storyteller", prompt="A"))
        assert (await call.read()).HasField("started")
        call.cancel()
        await asyncio.wait_for(cluster.head.cancelled.wait(), 5)


async def test_what_is_wrong_is_said_with_its_status(cluster: FakeCluster) -> None:
    async with stub_of(cluster) as stub:
        with pytest.raises(NotFound, match="deployed are: storyteller"):
            await generate(stub, model="nothing", prompt="A")
        with pytest.raises(InvalidRequest, match="no input"):
            await generate(stub)
        with pytest.raises(InvalidRequest, match="no messages"):
            await generate(stub, chat=inference_pb2.ChatMessages())
        with pytest.raises(InvalidRequest, match="128"):
            await generate(stub, tokens=inference_pb2.TokenIds(ids=[5] * 128))
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await generate(stub, tokens=inference_pb2.TokenIds(ids=[5000]))
        with pytest.raises(InvalidRequest, match="16 stop strings"):
            await generate(stub, prompt="A", stop=[str(number) for number in range(17)])
        cluster.head.error = QueueIsFull("full", 3)
        with pytest.raises(QueueIsFull) as caught:
            await generate(stub, prompt="A")
        assert caught.value.retry_after_s == 3
        await cluster.put(cluster.info(state=pipeline_pb2.DEPLOYING, progress=0.5))
        with pytest.raises(Unavailable, match="50%"):
            await generate(stub, prompt="A")


async def test_workers_may_not_ask_for_text(cluster: FakeCluster) -> None:
    async with stub_of(cluster, "worker") as stub:
        with pytest.raises(PermissionDenied):
            await generate(stub, prompt="A")


async def test_nobody_without_a_certificate_is_served(cluster: FakeCluster) -> None:
    async with grpc.aio.insecure_channel(cluster.router.node.grpc_address) as made:
        stub = inference_pb2_grpc.InferenceStub(made)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Tokenize(inference_pb2.TokenizeRequest(model="storyteller", text="x"), timeout=2)
