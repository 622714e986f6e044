"""What OpenAI's clients may send: what is taken, and what is refused with which words."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eldric.router.errors import InvalidParameter
from eldric.router.openai_errors import ApiError, api_error
from eldric.router.openai_types import ChatBody, chat_body, completion_body

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatBody:
    return chat_body({"model": "m", "messages": HELLO, **fields})


def refusal_of(check: Any, body: dict[str, Any]) -> ApiError:
    with pytest.raises((InvalidParameter, ValidationError)) as caught:
        made = check(body)
        assert made.limit >= 0
        made.logprob_count  # noqa: B018 (it may raise)
    return api_error(caught.value, "/v1")


def refused(**fields: Any) -> ApiError:
    return refusal_of(chat_body, {"model": "m", "messages": HELLO, **fields})


def completion_refused(**fields: Any) -> ApiError:
    return refusal_of(completion_body, {"model": "m", "prompt": "Hi", **fields})


def test_absent_and_null_parameters_stay_absent() -> None:
    body = chat(temperature=None, stop=None, n=None, seed=None, max_tokens=None, stream_options=None)
    assert body.sampling(None).ByteSize() == 0
    assert (body.choices, body.stop, body.seed_bits, body.limit, body.logprob_count) == (1, None, None, 0, None)


def test_every_sampling_parameter_reaches_the_head() -> None:
    sampling = chat(
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        presence_penalty=-1,
        frequency_penalty=2,
        repeat_penalty=1.5,
        repeat_last_n=-1,
        logit_bias={"5": -100, "9": 2.5},
    ).sampling(3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.25)
    assert sampling.HasField("temperature")
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert (sampling.repetition_penalty, sampling.penalty_last_n) == (1.5, -1)
    assert dict(sampling.logit_bias) == {5: -100, 9: 2.5}
    assert sampling.logprobs == 3


def test_values_at_the_edge_mean_what_llama_cpp_means() -> None:
    assert chat(top_k=-1).sampling(None).top_k == 0
    assert 0 < chat(top_p=0).sampling(None).top_p < 0.001
    assert chat(seed=-1).seed_bits is None
    assert chat(seed=-2).seed_bits == 2**64 - 2
    assert chat(max_tokens=-1).limit == 0
    assert chat(max_tokens=5, max_completion_tokens=7).limit == 7
    assert chat(stop="").stop == []
    assert chat(stop=["a", "", "a", "b"]).stop == ["a", "b"]


def test_unknown_parameters_are_ignored() -> None:
    assert chat(user="me", metadata={"a": 1}, store=True, cache_prompt=True, reasoning_effort="low").choices == 1


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    body = chat_body({"messages": [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]})
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "One\ntwo"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["Hi", [1]], ["Hi", [1]]),
    ],
)
def test_prompts_come_in_every_shape(prompt: Any, prompts: list[Any]) -> None:
    assert completion_body({"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize("prompt", [None, [], 5, {}, [1, "a"], [[1, "a"]], [1.5], [True], [[]] * 129])
def test_a_prompt_of_another_shape_is_refused(prompt: Any) -> None:
    error = refusal_of(completion_body, {"prompt": prompt})
    assert (error.http_code, error.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "hot", "expected a number, but got a string"),
        ("temperature", True, "expected a number, but got a boolean"),
        ("max_tokens", 1.5, "expected an integer, but got a number"),
        ("max_tokens", "16", "expected an integer, but got a string"),
        ("stream", 1, "expected a boolean, but got an integer"),
        ("messages", "Hi", "expected an array, but got a string"),
        ("stop", 7, "expected an array, but got an integer"),
        ("logit_bias", [1], "expected an object, but got an array"),
        ("n", None, ""),
        ("n", {}, "expected an integer, but got an object"),
    ],
)
def test_a_wrong_type_is_named_with_what_was_expected(field: str, value: Any, words: str) -> None:
    if not words:
        assert chat(**{field: value}).choices == 1
        return
    error = refused(**{field: value})
    assert (error.http_code, error.type, error.param, error.code) == (
        400,
        "invalid_request_error",
        field,
        "invalid_type",
    )
    assert words in error.message
    assert f"'{field}'" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("min_p", -1),
        ("n", 0),
        ("n", 129),
        ("max_tokens", -2),
        ("max_tokens", 2**31),
        ("max_completion_tokens", 0),
        ("presence_penalty", 11),
        ("repeat_penalty", 0),
        ("seed", 2**64),
        ("stop", ["x"] * 0 + [str(i) for i in range(17)]),
        ("stop", "x" * 1025),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("messages", []),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.http_code == 400
    assert error.param in (field, "max_tokens")


def test_a_nested_field_is_named_by_its_path() -> None:
    assert refused(messages=[*HELLO, {"role": "user", "content": 5}]).param == "messages[1].content"
    assert refused(messages=[{"role": "robot", "content": "x"}]).param == "messages[0].role"
    assert refused(messages=[{"content": "x"}]).message == "Missing required parameter: 'messages[0].role'."
    assert refused(stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refused(logit_bias={"3": 101}).param == "logit_bias.3"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "text only" in refused(messages=[{"role": "user", "content": image}]).message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_object"}),
        ("best_of", 3),
        ("modalities", ["audio"]),
        ("grammar", "root ::= x"),
        ("suffix", "end"),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert (error.http_code, error.param, error.code) == (400, field, "unsupported_parameter")
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("best_of", 1), ("tools", None)],
)
def test_asking_for_nothing_that_is_not_served_is_fine(field: str, value: Any) -> None:
    assert chat(**{field: value}).choices == 1


def test_stream_options_need_a_stream() -> None:
    assert refused(stream_options={"include_usage": True}).param == "stream_options"


def test_echo_and_logprobs_do_not_go_together() -> None:
    assert completion_refused(echo=True, logprobs=2).param == "echo"


def test_a_long_value_is_not_repeated_whole() -> None:
    error = refused(temperature="x" * 10_000, messages=[{"role": "y" * 10_000, "content": ""}])
    assert len(error.message) < 500
    assert len(refused(logit_bias={"1" * 5000: 1}).message) < 500


def test_text_that_is_no_unicode_is_refused() -> None:
    assert refused(messages=[{"role": "user", "content": "\ud800"}]).param == "messages[0].content"
    assert refused(model="\ud800").param == "model"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *ChatBody.model_fields,
        *("prompt", "echo", "logprobs", "tools", "response_format", "best_of", "suffix", "content", "role"),
    ]
)
NEAR = st.fixed_dictionaries(
    {"messages": st.just(HELLO) | JSON, "prompt": st.text(max_size=9) | st.lists(st.integers(), max_size=3) | JSON}
)


@given(near=NEAR, fields=st.dictionaries(FIELDS, JSON, max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_body_is_more_than_a_client_error(near: dict[str, Any], fields: dict[str, Any]) -> None:
    for check in (chat_body, completion_body):
        try:
            body = check(near | fields)
            body.sampling(body.logprob_count)
            assert body.limit >= 0
        except (InvalidParameter, ValidationError) as error:
            assert api_error(error, "/v1").http_code == 400
