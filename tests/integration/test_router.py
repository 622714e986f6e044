"""A router on real sockets, between OpenAI's own client and a head that says what a test wants."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from eldric.engine.errors import InvalidSampling
from eldric.errors import NotSupported, QueueIsFull, Unavailable
from eldric.v1 import inference_pb2, pipeline_pb2
from tests.fake_cluster import HELLO, STORY, FakeCluster, client_of, http_of, speak, until

# OpenAI's client


async def test_the_async_client_streams_a_chat(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        stream = await client.chat.completions.create(
            model="storyteller", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == STORY
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(cluster.words(STORY))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.system_fingerprint and chunk.created and chunk.model == "storyteller" for chunk in chunks)
    assert len(chunks) > 4


async def test_the_sync_client_streams_a_chat_and_gets_it_whole(cluster: FakeCluster) -> None:
    def ask() -> tuple[str, str | None]:
        with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            stream = client.chat.completions.create(model="storyteller", messages=HELLO, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole = client.chat.completions.create(model="storyteller", messages=HELLO)
            return text, whole.choices[0].message.content

    assert await asyncio.to_thread(ask) == (STORY, STORY)


async def test_a_chat_is_rendered_by_the_models_template(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        answer = await client.chat.completions.create(model="storyteller", messages=HELLO)
    prompt = cluster.tokenizer.decode(cluster.head.requests[0].tokens.ids, special=True)
    assert prompt.endswith("<|user|>\nTell me a story.<|end|>\n<|assistant|>\n")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(cluster.head.requests[0].tokens.ids)


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({}, "<|assistant|>\nOnce upon"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|assistant|>\nOnce upon"),
        ({"add_generation_prompt": True}, "<|assistant|>\nOnce upon<|end|>\n<|assistant|>\n"),
        ({"add_generation_prompt": False}, "<|assistant|>\nOnce upon<|end|>\n"),
    ],
)
async def test_an_answer_that_was_begun_is_continued(cluster: FakeCluster, fields: dict[str, Any], ends: str) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    async with client_of(cluster) as client:
        answer = await client.chat.completions.create(model="storyteller", messages=begun, extra_body=fields)
        with pytest.raises(openai.BadRequestError, match="'continue_final_message'") as refused:
            await client.chat.completions.create(
                model="storyteller", messages=HELLO, extra_body={"continue_final_message": True}
            )
    assert answer.choices[0].message.content == STORY, "what was given is not said again"
    assert cluster.tokenizer.decode(cluster.head.requests[0].tokens.ids, special=True).endswith(ends)
    assert refused.value.param == "continue_final_message"


async def test_completions_take_choices_prompts_and_echo(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        answer = await client.completions.create(
            model="storyteller", prompt=["A dog", "A cat"], n=2, seed=7, echo=True, max_tokens=3
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    begin = cluster.tokenizer.decode(cluster.words(STORY)[:3])
    assert [choice.text for choice in answer.choices] == [
        prompt + begin for prompt in ("A dog", "A dog", "A cat", "A cat")
    ]
    seeds = {request.request_id[-1]: request.sampling.seed for request in cluster.head.requests}
    assert seeds["0"] == seeds["2"] == 7
    assert seeds["1"] == seeds["3"] != 7
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    first = min(cluster.head.requests, key=lambda request: request.request_id).tokens.ids
    assert list(first) == [cluster.tokenizer.bos_id, *cluster.words("A dog")]


async def test_several_choices_stream_side_by_side(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        stream = await client.completions.create(model="storyteller", prompt="A", n=3, stream=True)
        texts, reasons = ["", "", ""], {}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason
    assert texts == [STORY] * 3
    assert reasons == dict.fromkeys(range(3), "length")


async def test_parameters_reach_the_head(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        await client.chat.completions.create(
            model="storyteller",
            messages=HELLO,
            temperature=0.5,
            max_completion_tokens=4,
            logit_bias={"5": -100},
            extra_body={"top_k": 3, "ignore_eos": True, "repeat_penalty": 1.25, "stop_token_ids": [9, 7]},
        )
        await client.chat.completions.create(model="storyteller", messages=HELLO)
    first, second = cluster.head.requests
    assert (first.max_tokens, first.sampling.temperature, first.sampling.top_k) == (4, 0.5, 3)
    assert (dict(first.sampling.logit_bias), first.sampling.repetition_penalty) == ({5: -100}, 1.25)
    assert (first.ignore_eos, list(first.stop_tokens)) == (True, [7, 9])
    assert (second.max_tokens, second.sampling.ByteSize()) == (0, 0)
    assert list(second.stop_tokens) == sorted(cluster.tokenizer.eog_ids)


async def test_a_stop_string_across_tokens_ends_the_text_and_the_generation(cluster: FakeCluster) -> None:
    words = cluster.words(STORY)

    async def say(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        for token in words:
            yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=token, logprob=-1)])
        await asyncio.Event().wait()

    cluster.head.say = say
    async with client_of(cluster) as client:
        stream = await client.chat.completions.create(
            model="storyteller", messages=HELLO, stop=["nothing", "e th"], stream=True
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        assert "".join(choice.delta.content or "" for choice in chunks) == "Once upon a tim"
        assert chunks[-1].finish_reason == "stop"
        await asyncio.wait_for(cluster.head.cancelled.wait(), 5)
        whole = await client.chat.completions.create(
            model="storyteller", messages=HELLO, stop=" a", logprobs=True, top_logprobs=1
        )
    assert whole.choices[0].message.content == "Once upon"
    assert whole.choices[0].logprobs is not None
    assert "".join(each.token for each in whole.choices[0].logprobs.content or []) == "Once upon"
    await until(lambda: cluster.head.running == 0)


async def test_characters_are_never_cut(cluster: FakeCluster) -> None:
    text = "naïve — 日本 🙂"
    tokens = cluster.words(text)
    assert cluster.tokenizer.decode(tokens) == text
    cluster.head.say = speak(tokens)
    async with client_of(cluster) as client:
        stream = await client.completions.create(model="storyteller", prompt="A", stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


async def test_logprobs_of_streams_are_those_of_whole_answers(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        whole = await client.chat.completions.create(model="storyteller", messages=HELLO, logprobs=True, top_logprobs=2)
        stream = await client.chat.completions.create(
            model="storyteller", messages=HELLO, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [
            entry
            async for chunk in stream
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content or []
        ]
        plain = await client.completions.create(model="storyteller", prompt="A", logprobs=2)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert streamed == content
    assert "".join(entry.token for entry in content) == STORY
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.tokens == [entry.token for entry in content]
    assert plain.choices[0].logprobs.token_logprobs == [entry.logprob for entry in content]


async def test_models_are_listed(cluster: FakeCluster) -> None:
    await cluster.put(cluster.info("second"))
    async with client_of(cluster) as client:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["second", "storyteller"]
        assert (await client.models.retrieve("second")).created == 1_700_000_000
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("third")


async def test_a_model_name_may_be_left_out_while_there_is_one(cluster: FakeCluster) -> None:
    async with http_of(cluster) as http:
        assert (await http.post("/v1/completions", json={"prompt": "A"})).status_code == 200
        await cluster.put(cluster.info("other", model="another"))
        answer = await http.post("/v1/completions", json={"prompt": "A"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


# Errors


async def test_an_unknown_model_is_404_with_the_known_ones(cluster: FakeCluster) -> None:
    async with client_of(cluster) as client:
        with pytest.raises(openai.NotFoundError, match="storyteller") as caught:
            await client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_prompt_beyond_the_context_is_refused(cluster: FakeCluster) -> None:
    long: list[Any] = [{"role": "user", "content": "little dog " * 100}]
    async with client_of(cluster) as client:
        with pytest.raises(openai.BadRequestError, match="128") as caught:
            await client.chat.completions.create(model="storyteller", messages=long)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert cluster.head.requests == []


async def test_a_full_queue_is_429_with_retry_after(cluster: FakeCluster) -> None:
    cluster.head.error = QueueIsFull("all slots are taken", 7)
    async with client_of(cluster) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="storyteller", messages=HELLO, stream=True)
    assert caught.value.response.headers["retry-after"] == "7"


async def test_a_loading_model_is_503_with_its_progress(cluster: FakeCluster) -> None:
    await cluster.put(cluster.info(state=pipeline_pb2.DEPLOYING, progress=0.25))
    async with http_of(cluster) as http:
        answer = await http.post("/v1/chat/completions", json={"model": "storyteller", "messages": HELLO})
        health = await http.get("/health")
    assert (answer.status_code, answer.json()["error"]["progress"]) == (503, 0.25)
    assert answer.json()["error"]["code"] == "model_loading"
    assert int(answer.headers["retry-after"]) >= 1
    assert (health.status_code, health.json()["progress"]) == (503, 0.25)
    await cluster.put(cluster.info())
    async with http_of(cluster) as http:
        assert (await http.get("/health")).status_code == 200


async def test_a_degraded_model_is_503(cluster: FakeCluster) -> None:
    await cluster.put(cluster.info(state=pipeline_pb2.DEGRADED, message="worker w2 is lost"))
    async with client_of(cluster) as client:
        with pytest.raises(openai.InternalServerError, match="worker w2 is lost") as caught:
            await client.completions.create(model="storyteller", prompt="A")
    assert caught.value.status_code == 503


async def test_a_head_that_is_gone_is_503(cluster: FakeCluster) -> None:
    await cluster.head_nodes["w1"].stop()
    async with client_of(cluster) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="storyteller", prompt="A")
    assert caught.value.status_code == 503


async def test_a_stage_lost_in_mid_stream_is_an_error_event_and_no_done(cluster: FakeCluster) -> None:
    words = cluster.words("Once upon")

    async def say(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        for token in words:
            yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=token)])
        raise Unavailable("stage 1 on w2 is lost")

    cluster.head.say = say
    async with http_of(cluster) as http:
        answer = await http.post("/v1/completions", json={"prompt": "A", "stream": True, "n": 2})
    events = [line for line in answer.text.split("\n\n") if line]
    assert "[DONE]" not in answer.text
    assert "stage 1 on w2 is lost" in json.loads(events[-1][6:])["error"]["message"]
    assert json.loads(events[-1][6:])["error"]["type"] == "server_error"
    async with client_of(cluster) as client:
        with pytest.raises(openai.APIError, match="stage 1 on w2 is lost"):
            async for _ in await client.chat.completions.create(model="storyteller", messages=HELLO, stream=True):
                pass
        with pytest.raises(openai.InternalServerError, match="stage 1 on w2 is lost") as caught:
            await client.chat.completions.create(model="storyteller", messages=HELLO)
    assert caught.value.status_code == 503
    assert cluster.head.running == 0


async def test_a_model_that_cannot_embed_is_not_to_be_asked_again(cluster: FakeCluster) -> None:
    cluster.head.error = NotSupported("it pools its tokens")
    async with client_of(cluster) as client:
        with pytest.raises(openai.BadRequestError, match="pools its tokens") as refused:
            await client.embeddings.create(model="storyteller", input="A")
    assert refused.value.code == "unsupported_model"


async def test_what_the_head_refuses_is_a_client_error(cluster: FakeCluster) -> None:
    cluster.head.error = InvalidSampling("temperature", "at most 2", 9)
    async with client_of(cluster) as client:
        with pytest.raises(openai.BadRequestError, match="at most 2"):
            await client.completions.create(model="storyteller", prompt="A", temperature=9)
