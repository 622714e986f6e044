"""What OpenAI's clients may send: what is taken, and what is refused with which words."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eldric.router import openai_unserved
from eldric.router.errors import InvalidParameter
from eldric.router.openai_embeddings import embeddings_body
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
    assert chat(n_predict=3).limit == 3 and chat(n_predict=3, max_tokens=5).limit == 5
    assert completion_body({"prompt": "Hi", "max_completion_tokens": 7}).limit == 7
    assert chat(stop_token_ids=[7, 0]).stop_token_ids == [7, 0]
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
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("n_predict", 0),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(129))),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"self": 1}),
        ("chat_template_kwargs", {"not a name": 1}),
        ("chat_template_kwargs", {"said": ["\ud800"]}),
        ("presence_penalty", 11),
        ("repeat_penalty", 0),
        ("seed", 2**64),
        ("stop", ["x"] * 0 + [str(i) for i in range(17)]),
        ("stop", "x" * 1025),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("messages", []),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.http_code == 400
    assert error.param is not None and error.param.partition("[")[0] == field


def test_a_nested_field_is_named_by_its_path() -> None:
    assert refused(messages=[*HELLO, {"role": "user", "content": 5}]).param == "messages[1].content"
    assert refused(messages=[{"role": "robot", "content": "x"}]).param == "messages[0].role"
    assert refused(messages=[{"content": "x"}]).message == "Missing required parameter: 'messages[0].role'."
    assert refused(stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refused(logit_bias={"3": 101}).param == "logit_bias.3"
    image = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    message = refused(messages=[{"role": "user", "content": image}]).message
    assert "text only" in message and "part 1 " in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_object"}),
        ("response_format", "json"),
        ("tools", {}),
        ("tool_choice", False),
        ("best_of", 3),
        ("best_of", True),
        ("modalities", ["audio"]),
        ("chat_template", "{{ messages }}"),
        ("echo", True),
        ("typical_p", 0.5),
        ("mirostat", 2),
        ("min_tokens", 5),
        ("skip_special_tokens", False),
        ("guided_choice", ["a"]),
        ("truncate_prompt_tokens", 5),
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
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("best_of", 1),
        ("tools", None),
        ("typical_p", 1.0),
        ("mirostat", 0),
        ("min_tokens", 0),
        ("skip_special_tokens", True),
        ("echo", False),
    ],
)
def test_asking_for_nothing_that_is_not_served_is_fine(field: str, value: Any) -> None:
    assert chat(**{field: value}).choices == 1


def test_as_many_best_as_choices_are_all_of_them() -> None:
    assert completion_body({"prompt": "Hi", "best_of": 2, "n": 2}).choices == 2
    assert completion_refused(best_of=1, n=2).param == "best_of"


def test_each_endpoint_refuses_the_other_ones_parameters() -> None:
    assert completion_refused(top_logprobs=2).param == "top_logprobs"
    assert completion_refused(prompt_embeds="x").param == "prompt_embeds"
    error = refusal_of(embeddings_body, {"input": "Hi", "normalize": False})
    assert (error.param, error.code) == ("normalize", "unsupported_parameter")
    assert embeddings_body({"input": "Hi", "normalize": True, "embd_normalize": 2}).input == ["Hi"]


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "audio"])
def test_what_a_message_may_not_have_is_refused_by_name(field: str) -> None:
    said = {"role": "assistant", "content": None}
    error = refused(messages=[*HELLO, {**said, field: [{"id": "a"}]}, *HELLO])
    assert (error.param, error.code) == (f"messages[1].{field}", "unsupported_parameter")
    assert chat(messages=[*HELLO, {**said, field: None}, *HELLO]).choices == 1, "OpenAI's answers have it as null"


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_only_an_assistant_says_nothing(role: str, content: dict[str, Any]) -> None:
    error = refused(messages=[{"role": role, **content}])
    assert (error.param, error.code) == ("messages[0].content", "invalid_value")
    assert "null" in error.message


def test_templates_see_what_else_a_message_has() -> None:
    messages = [
        {"role": "user", "content": "Hi", "name": "bob", "unknown": 1},
        {"role": "assistant", "content": None, "refusal": "No.", "reasoning_content": "Hm."},
        {"role": "tool", "content": "5", "tool_call_id": "call-1"},
    ]
    assert chat(messages=messages).conversation.messages == [
        {"role": "user", "content": "Hi", "name": "bob"},
        {"role": "assistant", "content": "No.", "reasoning_content": "Hm."},
        {"role": "tool", "content": "5", "tool_call_id": "call-1"},
    ]
    assert refused(messages=[{"role": "user", "content": "Hi", "name": 5}]).param == "messages[0].name"


def test_templates_see_the_variables_of_a_request() -> None:
    body = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert body.conversation.variables == {"reasoning_effort": "low", "enable_thinking": False}


SAID = [*HELLO, {"role": "assistant", "content": "Once"}]


@pytest.mark.parametrize(
    ("messages", "fields", "continues", "opens"),
    [
        (HELLO, {}, False, True),
        (SAID, {}, True, True),
        (SAID, {"continue_final_message": True}, True, True),
        (SAID, {"continue_final_message": True, "add_generation_prompt": False}, True, False),
        (SAID, {"continue_final_message": False}, False, True),
        (SAID, {"add_generation_prompt": True}, False, True),
        (SAID, {"add_generation_prompt": False}, False, False),
        ([*HELLO, {"role": "assistant", "content": ""}], {}, False, True),
        ([*HELLO, {"role": "assistant"}], {"continue_final_message": True}, False, True),
        (HELLO, {"add_generation_prompt": False}, False, False),
    ],
)
def test_a_last_message_of_the_assistant_is_continued_unless_told_otherwise(
    messages: Any, fields: dict[str, Any], continues: bool, opens: bool
) -> None:
    made = chat(messages=messages, **fields).conversation
    assert (made.continues, made.opens) == (continues, opens)


@pytest.mark.parametrize(("messages", "opens"), [(SAID, True), (HELLO, None)])
def test_what_cannot_be_continued_is_refused(messages: Any, opens: bool | None) -> None:
    body = chat(messages=messages, continue_final_message=True, add_generation_prompt=opens)
    with pytest.raises(InvalidParameter) as caught:
        body.conversation  # noqa: B018
    assert caught.value.param == "continue_final_message"


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
        *openai_unserved.CHAT,
        *("prompt", "echo", "logprobs", "best_of", "content", "role"),
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
