"""Chat templates: what real ones render, what they refuse, and what a hostile one cannot do."""

import json
import resource
import time
from datetime import datetime
from typing import Any

import pytest

from eldric.engine.chat import ChatTemplate
from eldric.engine.errors import InvalidModel, InvalidPrompt
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from tests.models import smollm2, storyteller

USER = {"role": "user", "content": "Hi"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": 'Is 1 < 2 & "x"?'},
]


def metadata_of(model: ModelFile) -> dict[str, Any]:
    return {key: model.metadata[key] for key in model.metadata if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    model = ModelFile.open(storyteller())
    try:
        return Tokenizer.from_metadata(metadata_of(model))
    finally:
        model.close()


def render(tokenizer: Tokenizer, source: str, messages: Any = (USER,), **options: Any) -> str:
    return ChatTemplate.from_metadata({"tokenizer.chat_template": source}, tokenizer).render(messages, **options)


def test_the_real_models_templates_render_as_llama_cpp_renders_them() -> None:
    for path, alone, chat in (
        (
            smollm2(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            '<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nIs 1 < 2 & "x"?<|im_end|>\n<|im_start|>assistant\n',
        ),
        (
            storyteller(),
            "<|user|>\nHi<|end|>\n<|assistant|>\n",
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n"
            '<|user|>\nIs 1 < 2 & "x"?<|end|>\n<|assistant|>\n',
        ),
    ):
        model = ModelFile.open(path)
        template = ChatTemplate.from_metadata(metadata_of(model), Tokenizer.from_metadata(metadata_of(model)))
        model.close()
        assert template.render([USER]) == alone
        assert template.render(CHAT) == chat
        without = template.render(CHAT, add_generation_prompt=False)
        assert chat.startswith(without) and without.endswith(("<|im_end|>\n", "<|end|>\n"))


def test_a_message_that_is_left_open_ends_where_its_text_does(tokenizer: Tokenizer) -> None:
    def left_open(template: ChatTemplate, said: str) -> str:
        return template.render_open([USER, {"role": "assistant", "content": said}])

    for path, before in (
        (smollm2(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (storyteller(), "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ):
        with ModelFile.open(path) as model:
            template = ChatTemplate.from_metadata(metadata_of(model), Tokenizer.from_metadata(metadata_of(model)))
        for said in ("Once upon", "Once ", "Hi", "<|im_end|>", "{{ 1 }}"):
            assert left_open(template, said).endswith(before + said)
    trims = ChatTemplate.from_metadata(
        {"tokenizer.chat_template": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"}, tokenizer
    )
    assert left_open(trims, " Once ") == "[Hi][Once "
    deaf = ChatTemplate.from_metadata({"tokenizer.chat_template": "{{ messages[0].content }}"}, tokenizer)
    with pytest.raises(InvalidPrompt, match="cannot be continued"):
        left_open(deaf, "Once")


def test_a_file_without_a_template_gets_chatml(tokenizer: Tokenizer) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate.from_metadata({}, tokenizer).render([USER]) == expected
    assert render(tokenizer, "") == expected


def test_tools_choose_the_files_template_for_tools(tokenizer: Tokenizer) -> None:
    metadata = {
        "tokenizer.chat_template": "plain {{ tools is defined }}",
        "tokenizer.chat_template.tool_use": "tools {{ tools | tojson }}",
    }
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    tools = [{"type": "function", "function": {"name": "f<é>"}}]
    assert template.render([USER]) == template.render([USER], tools=[]) == "plain False"
    assert template.render([USER], tools=tools) == f"tools {json.dumps(tools, ensure_ascii=False)}"


def test_a_bos_token_that_encoding_adds_is_left_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.add_bos and tokenizer.bos_id is not None
    prompt = render(tokenizer, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert prompt == "Hi" + tokenizer.piece(tokenizer.eos_id or 0)
    ids = tokenizer.encode(prompt, special=True)
    assert ids.count(tokenizer.bos_id) == 1 and ids[-1] == tokenizer.eos_id


def test_templates_have_what_models_rely_on(tokenizer: Tokenizer) -> None:
    source = """
    {%- for n in range(9) %}{% if n == 3 %}{% break %}{% endif %}{{ loop.index }}/{{ loop.length }} {% endfor %}
    {%- set found = [] %}{% do found.extend([]) if false %}
    {%- generation %}{{ strftime_now('%Y') }}{% endgeneration %}
    {{- messages | map(attribute='role') | tojson(indent=None) }} {{ enable_thinking }}
    {%- if x %}{% endif %}
    """
    year = datetime.now().strftime("%Y")
    assert render(tokenizer, source, enable_thinking=True).strip() == f'1/9 2/9 3/9 {year}["user"] True'


def test_text_parts_become_one_text(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    source = "{{ messages[0].content is string }}: {{ messages[0].content | length }}"
    assert render(tokenizer, source, [{"role": "user", "content": parts}]) == "True: 3"
    assert render(tokenizer, source, [{"role": "user", "content": [*parts, image]}]) == "False: 3"


NO_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{{- m.role }}: {{ m.content }};{% endfor %}"""


def test_a_system_message_moves_to_the_user_where_the_template_takes_none(tokenizer: Tokenizer) -> None:
    assert render(tokenizer, NO_SYSTEM, CHAT[:3]) == "user: Be brief.\nHi;assistant: Yo;"
    assert CHAT[0]["content"] == "Be brief."


def test_what_a_template_refuses_is_the_callers_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidPrompt, match="refuses these messages: no system role") as caught:
        render(tokenizer, NO_SYSTEM, [CHAT[0], CHAT[2]])
    assert caught.value.status == "INVALID_ARGUMENT"
    with pytest.raises(InvalidPrompt, match=r"fails on these messages: can only concatenate str"):
        render(tokenizer, "{{ 'a' + messages[0].content }}", [{"role": "user", "content": None}])
    with pytest.raises(InvalidPrompt, match="has no attribute 'content'"):
        render(tokenizer, "{{ messages[0].content.x }}", [{"role": "user"}])


def test_a_template_that_does_not_compile_is_named_with_its_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidPrompt, match="broken at line 2"):
        render(tokenizer, "a\n{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ range(1000000) | list | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidPrompt):
        render(tokenizer, source)
    assert USER == {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in [9, 9, 9] * 9 %}{% for b in 'x' * 9999 %}{{ cycler(1).next() }}{% endfor %}{% endfor %}",
        "{% for a in 'ab' recursive %}{% if loop.depth < 30 %}{{ loop('ab') }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
        "{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
    ],
)
def test_endless_templates_end(source: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eldric.engine.chat_sandbox.MAX_STEPS", 50_000)
    begun = time.process_time()
    with pytest.raises(InvalidPrompt, match=r"takes more than 50000 steps|writes more than"):
        render(tokenizer, source)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
        "{% for a in range(99999) %}{{ ('x' * 99999) | upper | length }}{% endfor %}",
        "{{ lipsum(n=100000) }}",
        "{{ 'a'.center(900000000) | length }}",
        "{{ 'a' | center(900000000) | length }}",
        "{{ ('a' * 900000000) | length }}",
        "{{ ('%900000000d' % 1) | length }}",
        "{{ ('%*d' % (900000000, 1)) | length }}",
        "{{ '{:900000000}'.format(1) | length }}",
        "{{ '{:{}}'.format(1, 900000000) | length }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) | length }}",
        "{{ (('a' * 9999) | replace('a', 'b' * 9999)) | length }}",
        "{{ 'x' | indent(900000000, first=true) | length }}",
        "{% set n = namespace(s='xx') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(k=[]) %}{% for a in range(9999) %}{% set n.k = n.k + ['x' * 999999] %}{% endfor %}",
        "{{ 10 ** 30000000 }}",
        "{% for a in range(99999) %}{{ 9 ** 4000000 > a }}{% endfor %}",
        "{% set n = namespace(k=9) %}{% for a in range(60) %}{% set n.k = n.k * n.k %}{% endfor %}",
    ],
)
def test_a_template_takes_neither_much_time_nor_much_memory(source: str, tokenizer: Tokenizer) -> None:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidPrompt):
        render(tokenizer, source)
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_large_numbers_that_are_no_sizes_do_no_harm(tokenizer: Tokenizer) -> None:
    source = "{{ none | default(1700000000, true) }} {{ '%d' % 99999 }} {{ 2 ** 40 }} {{ '{}'.format(7) ~ 'x' * 3 }}"
    assert render(tokenizer, source) == "1700000000 99999 1099511627776 7xxx"


def test_a_template_of_the_wrong_kind_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidModel, match="is not a string"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 3}, tokenizer)
    with pytest.raises(InvalidModel, match="more than 1048576 characters"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": "x" * (1 << 20) + "y"}, tokenizer)
