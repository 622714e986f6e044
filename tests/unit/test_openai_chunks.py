"""OpenAI's answers: the chunks of streams and whole ones, in the shapes that its clients parse."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from eldric.engine.chat import ChatTemplate
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from eldric.router.generation import Delta, Finished, Token
from eldric.router.openai_chunks import ChatFormat, Choice, CompletionFormat, settled_at_end, total_usage
from eldric.router.openai_logprobs import LEAST, ChatLogprobs, CompletionLogprobs
from eldric.router.vocabularies import Vocabulary
from tests.models import storyteller

ENVELOPE = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": "m", "system_fingerprint": "fp_1"}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    with ModelFile.open(storyteller()) as model:
        tokenizer = Tokenizer.from_metadata(model.metadata)
        return Vocabulary(tokenizer, ChatTemplate.from_metadata(model.metadata, tokenizer), (4,), 13)


def finished(reason: str = "stop", stop: str = "", tokens: int = 2) -> Finished:
    return Finished(reason, stop, 5, tokens, 0.0, 0.0, 0.0, cached_tokens=2)


def parsed(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


def tokens(vocabulary: Vocabulary, text: str) -> list[Token]:
    ids = vocabulary.tokenizer.encode(text, special=False, add_bos=False)
    return [Token(id, -0.25 - number, ((id, -0.25 - number), (7, -3.0))) for number, id in enumerate(ids)]


def test_a_chat_stream_has_a_role_then_text_then_a_reason() -> None:
    format, choice = ChatFormat(ENVELOPE, include_usage=False), Choice(0, 0)
    first, text, end = (
        parsed(event)
        for event in (
            format.first(choice),
            format.delta(choice, Delta('A "quoted"\nline é', (), 1)),
            format.finish(choice, finished("length")),
        )
    )
    for chunk in (first, text, end):
        ChatCompletionChunk.model_validate(chunk)
        assert {key: chunk[key] for key in ENVELOPE} == ENVELOPE
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text["choices"] == [
        {"index": 0, "delta": {"content": 'A "quoted"\nline é'}, "logprobs": None, "finish_reason": None}
    ]
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]


def test_a_usage_chunk_has_no_choices_and_the_others_no_usage() -> None:
    format = ChatFormat(ENVELOPE, include_usage=True)
    choices = [Choice(0, 0, finished=finished(tokens=3)), Choice(1, 0, finished=finished(tokens=4))]
    assert parsed(format.delta(choices[0], Delta("x", (), 1)))["usage"] is None
    usage = parsed(format.usage(choices))
    assert usage["choices"] == []
    details = {"prompt_tokens_details": {"cached_tokens": 2}}
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, **details}
    ChatCompletionChunk.model_validate(usage)


def test_each_prompt_counts_once_however_many_choices_continue_it() -> None:
    choices = [Choice(index, index // 2, finished=finished()) for index in range(4)]
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    assert total_usage(choices) == {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, **details}


def test_nothing_to_show_makes_no_chunk() -> None:
    assert ChatFormat(ENVELOPE, False).delta(Choice(0, 0), Delta("", (Token(1, None, ()),), 0)) == b""
    assert CompletionFormat(ENVELOPE, False).first(Choice(0, 0)) == b""


def test_a_completion_stream_has_text_and_may_echo_the_prompt() -> None:
    format = CompletionFormat(ENVELOPE, False, ["Hi, ", "Ho, "])
    events = [
        format.first(Choice(1, 1)),
        format.delta(Choice(1, 1), Delta("you", (), 1)),
        format.finish(Choice(1, 1), finished()),
    ]
    chunks = [parsed(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    Completion.model_validate(chunks[-1])  # its type knows no null, which OpenAI sends in all chunks but the last
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Ho, ", "you", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {1}


def test_whole_answers_have_openais_shape() -> None:
    choice = Choice(0, 0, text=["Hello", " you"], finished=finished("length"))
    chat = json.loads(ChatFormat(ENVELOPE, False).answer([choice]))
    assert ChatCompletion.model_validate(chat).choices[0].message.content == "Hello you"
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"]["total_tokens"] == 7
    plain = json.loads(CompletionFormat(ENVELOPE, False, ["Well: "]).answer([choice]))
    assert Completion.model_validate(plain).choices[0].text == "Well: Hello you"


def test_chat_logprobs_name_bytes_and_alternatives(vocabulary: Vocabulary) -> None:
    choice = Choice(0, 0, ChatLogprobs(vocabulary))
    sampled = tokens(vocabulary, "Once upon")
    chunk = parsed(ChatFormat(ENVELOPE, False).delta(choice, Delta("Once upon", tuple(sampled), len(sampled))))
    ChatCompletionChunk.model_validate(chunk)
    content = chunk["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Once upon"
    assert b"".join(bytes(entry["bytes"]) for entry in content) == b"Once upon"
    assert [entry["logprob"] for entry in content] == [-0.25 - number for number in range(len(sampled))]
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert len(content[0]["top_logprobs"]) == 2


def test_logprobs_wait_for_their_text_and_those_of_a_stop_string_never_show(vocabulary: Vocabulary) -> None:
    logprobs = ChatLogprobs(vocabulary)
    one, two, three = (Token(id, -1.0, ()) for id in (20, 21, 22))
    assert logprobs.release([one, two], 1) is not None
    assert logprobs.release([three], 1) is None
    assert settled_at_end(finished(stop="END")) == 0
    assert logprobs.release([], 0) is None
    released = logprobs.release([], settled_at_end(finished()))
    assert released is not None
    assert len(released["content"]) == 2


@pytest.mark.parametrize("streamed", [True, False])
def test_completion_logprobs_are_columns_with_offsets_in_characters(vocabulary: Vocabulary, streamed: bool) -> None:
    logprobs = CompletionLogprobs(vocabulary)
    sampled = tokens(vocabulary, "Once upon a time there was.")
    if streamed:
        parts = [logprobs.release([token], number + 1) for number, token in enumerate(sampled)]
        columns: dict[str, Sequence[Any]] = {key: [part[key][0] for part in parts if part] for key in parts[0] or {}}
    else:
        logprobs.keep(sampled, None)
        columns = logprobs.whole()
    text = "".join(columns["tokens"])
    assert text == "Once upon a time there was."
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    assert columns["token_logprobs"] == [token.logprob for token in sampled]
    assert all(len(top) == 2 for top in columns["top_logprobs"])


def test_a_logprob_is_always_a_json_number(vocabulary: Vocabulary) -> None:
    logprobs = ChatLogprobs(vocabulary)
    logprobs.keep([Token(20, float("-inf"), ((21, float("nan")),)), Token(21, None, ())], None)
    first, second = logprobs.whole()["content"]
    assert (first["logprob"], first["top_logprobs"][0]["logprob"], second["logprob"]) == (LEAST, LEAST, LEAST)


def test_a_token_that_is_not_in_the_vocabulary_has_no_text(vocabulary: Vocabulary) -> None:
    logprobs = CompletionLogprobs(vocabulary)
    logprobs.keep([Token(100_000, -1.0, ())], None)
    assert logprobs.whole()["tokens"] == [""]
