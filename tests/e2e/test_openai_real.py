"""OpenAI's own Python package against a router, a pipeline of three workers and a real model."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.cli import Cli
from tests.e2e.clusters import ENDLESS, LiveCluster, attached, endless_on
from tests.e2e.conftest import STORY, Cluster
from tests.models import SmallLlama, write_small_llama

pytestmark = pytest.mark.timeout(60)

TELL = [{"role": "user", "content": "Tell me a story."}]
GREEDY: dict[str, Any] = {"model": STORY, "temperature": 0.0, "max_tokens": 40}
CONTEXT = 512  # of the pipeline in conftest.py
SLOTS, QUEUE = 2, 128  # of it, and of a worker


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.up['router_url']}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
async def asynchronous(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.up['router_url']}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
async def live(cluster: Cluster) -> AsyncIterator[LiveCluster]:
    async with attached(cluster.folder) as made:
        yield made


def chat(client: openai.OpenAI, **options: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(**{**GREEDY, "messages": TELL, **options})


def complete(client: openai.OpenAI, **options: Any) -> Any:
    create: Any = client.completions.create
    return create(**{**GREEDY, "prompt": "Once upon a time", **options})


def test_embeddings_are_those_of_the_command_line(client: openai.OpenAI, cli: Cli) -> None:
    said = cli("embed", STORY, "A fox", "--json").json
    answer = client.embeddings.create(model=STORY, input=["A fox", "A cat", "A fox"])
    vectors = [each.embedding for each in answer.data]
    assert vectors[0] == vectors[2] == pytest.approx(said["embedding"]) and vectors[1] != vectors[0]
    assert len(vectors[0]) == said["dimensions"] > 1
    assert answer.usage.prompt_tokens > said["usage"]["prompt_tokens"]


def test_a_chat_says_what_the_command_line_says(client: openai.OpenAI, cli: Cli) -> None:
    said = cli("run", STORY, TELL[0]["content"], "--temperature", 0, "--max-tokens", 40, "--json").json
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.content == said["text"]
    assert (choice.message.role, choice.finish_reason) == ("assistant", said["finish_reason"])
    assert answer.usage.prompt_tokens == said["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == said["usage"]["completion_tokens"] == len(said["tokens"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_next_turn_of_a_chat_goes_on_from_the_last_one(client: openai.OpenAI) -> None:
    tell = [{"role": "user", "content": "Tell me of a fox, a crow, a piece of cheese and how the three of them met."}]
    first = chat(client, messages=tell)
    turns = [*tell, {"role": "assistant", "content": first.choices[0].message.content}]
    turns.append({"role": "user", "content": "And then?"})
    second, anew = chat(client, messages=turns), chat(client, messages=turns, extra_body={"cache_prompt": False})
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 2
    assert anew.usage.prompt_tokens_details.cached_tokens == 0
    assert second.choices[0].message.content == anew.choices[0].message.content


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    anew: dict[str, Any] = {"extra_body": {"cache_prompt": False}}  # else the second finds the first one's prompt
    whole = chat(client, **anew)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **anew))
    *deltas, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in deltas][-1] == whole.choices[0].finish_reason
    assert not usage.choices and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


async def test_many_at_once_say_what_one_says(asynchronous: openai.AsyncOpenAI, client: openai.OpenAI) -> None:
    expected = complete(client).choices[0].text

    async def streamed() -> str:
        stream = await asynchronous.completions.create(**GREEDY, prompt="Once upon a time", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def whole() -> str:
        answer = await asynchronous.completions.create(**GREEDY, prompt="Once upon a time")
        return str(answer.choices[0].text)

    answers = await asyncio.gather(*(streamed() for _ in range(8)), *(whole() for _ in range(8)))
    assert set(answers) == {expected}


def test_several_choices_differ_by_their_seeds_and_are_the_same_again(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 24}
    first, again = complete(client, **options), complete(client, **options)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3 and texts == [choice.text for choice in again.choices]
    assert first.usage.completion_tokens <= 3 * 24
    streamed = {index: "" for index in range(3)}
    for chunk in complete(client, **options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert [*streamed.values()] == texts


def test_an_answer_that_was_begun_goes_on_as_if_it_had_never_ended(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=30).choices[0].message.content
    begun = whole[: whole.index(" ", len(whole) // 2)]
    messages = [*TELL, {"role": "assistant", "content": begun}]
    assert whole.startswith(begun + chat(client, messages=messages, max_tokens=5).choices[0].message.content)
    streamed = chat(client, messages=messages, max_tokens=5, stream=True)
    assert whole.startswith(begun + "".join(chunk.choices[0].delta.content or "" for chunk in streamed))


def test_a_stop_token_ends_the_answer_before_it(client: openai.OpenAI, cli: Cli) -> None:
    run = cli("run", STORY, "Once upon a time", "--raw", "--temperature", 0, "-n", 8, "--json").json
    stop = next(index for index, token in enumerate(run["tokens"]) if index and token not in run["tokens"][:index])
    answer = complete(client, max_tokens=8, extra_body={"stop_token_ids": [run["tokens"][stop]]})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", stop)
    assert run["text"].startswith(answer.choices[0].text)


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text[len(text) // 2 :][:6]
    stopped = complete(client, stop=["never said", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(chunk.choices[0].text for chunk in complete(client, stop=stop, stream=True)) == stopped.text


def test_logprobs_come_with_each_token(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0, "greedy takes the likeliest"
    assert "".join(entry.token for entry in entries) == choice.message.content
    old = complete(client, logprobs=2, max_tokens=5).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == 5 and all(len(top) == 2 for top in old.top_logprobs)


def test_logit_bias_bans_a_token(client: openai.OpenAI, cli: Cli) -> None:
    (banned, *_) = cli("run", STORY, "Once upon a time", "--raw", "--temperature", 0, "-n", 1, "--json").json["tokens"]
    plain, other = complete(client, max_tokens=1), complete(client, max_tokens=1, logit_bias={str(banned): -100})
    assert plain.choices[0].text != other.choices[0].text


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert STORY in {model.id for model in client.models.list()}
    assert client.models.retrieve(STORY).owned_by == "eldric"


def test_an_unknown_model_is_named_with_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=rf"'nothing'.*{STORY}") as refused:
        complete(client, model="nothing")
    assert refused.value.code == "model_not_found"


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)) as refused:
        complete(client, prompt="word " * CONTEXT)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    answer = complete(client, max_tokens=10_000, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT, "an answer ends where the context does"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"900000": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert refused.value.param == param


async def test_a_full_queue_says_when_to_come_back(
    cluster: Cluster, asynchronous: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    async with endless_on(cluster.folder, tmp_path) as live:
        request: dict[str, Any] = {"model": ENDLESS, "prompt": "a", "max_tokens": 8000, "stream": True}
        request |= {"extra_body": {"ignore_eos": True}}
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(asynchronous.completions.create(**request)) for _ in range(SLOTS + QUEUE)]
        await live.until_taken(SLOTS + QUEUE)
        with pytest.raises(openai.RateLimitError) as refused:
            await asynchronous.completions.create(**request)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.type == "rate_limit_error"
        await asyncio.gather(*(task.result().close() for task in asked))
        await live.until_free(limit_s=5.0)
        assert (await asynchronous.completions.create(**{**request, "max_tokens": 3, "stream": False})).choices[0].text


async def test_a_model_that_loads_says_how_far_it_is(
    live: LiveCluster, asynchronous: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    await live.client.models.add(write_small_llama(tmp_path / "slow.gguf", SmallLlama(layers=3)), "slow")
    live.signal("worker-2", signal.SIGSTOP)  # its stage loads for as long as it stands still
    deploying = asyncio.create_task(live.client.deploy("slow", stages=3))
    try:
        request: dict[str, Any] = {"model": "slow", "prompt": "a", "max_tokens": 3}
        async with asyncio.timeout(5):
            while True:
                with pytest.raises(openai.APIStatusError) as refused:
                    await asynchronous.completions.create(**request)
                if refused.value.status_code == 503:
                    break
                assert refused.value.status_code == 404, "the router has not heard of it yet"
        assert refused.value.code == "model_loading"
        assert 0 <= refused.value.body["progress"] < 1  # type: ignore[index]
        assert int(refused.value.response.headers["retry-after"]) >= 1
        live.signal("worker-2", signal.SIGCONT)
        assert (await deploying).state == "ready"
        async with asyncio.timeout(5):
            while True:
                try:
                    answer = await asynchronous.completions.create(**request)
                    break
                except openai.InternalServerError:
                    await asyncio.sleep(0.02)
        assert answer.usage is not None and answer.usage.completion_tokens <= 3
    finally:
        live.signal("worker-2", signal.SIGCONT)
        await asyncio.wait([deploying])
        await live.client.undeploy("slow")
        await live.client.models.remove("slow")
