"""Chat messages to a prompt, by the Jinja template that a model brings along."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from eldric.engine.chat_sandbox import BoundedEnvironment, rendering
from eldric.engine.errors import InvalidModel, InvalidPrompt
from eldric.engine.tokenizer import Tokenizer

_MAX_TEMPLATE = 1 << 20  # characters; the largest known template has 30 thousand
_MAX_OUTPUT = 1 << 26  # characters

# llama.cpp's choice for models that bring no template (common/chat.cpp).
_CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


class ChatTemplate:
    """A model's chat template, run in Jinja's sandbox.

    The template is code from the model file. The sandbox keeps it from reaching anything but the messages, and bounds
    the time and the memory that a rendering takes.
    """

    def __init__(self, source: str, tool_source: str | None, tokenizer: Tokenizer) -> None:
        """tool_source: what is used instead when tools are given."""
        if max(len(source), len(tool_source or "")) > _MAX_TEMPLATE:
            raise InvalidModel(f"the chat template has more than {_MAX_TEMPLATE} characters")
        self._sources = {False: source, True: tool_source or source}
        self._compiled: dict[str, jinja2.Template] = {}
        self._tokens = {
            name: "" if token is None else tokenizer.piece(token)
            for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        self._adds_bos = tokenizer.add_bos

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> "ChatTemplate":
        """The file's `tokenizer.chat_template` and, for tools, `tokenizer.chat_template.tool_use`. A file with none of
        them gets ChatML, as in llama.cpp. Raises InvalidModel if they are no strings or too long.
        """
        source = metadata.get("tokenizer.chat_template")
        tool_source = metadata.get("tokenizer.chat_template.tool_use")
        if not isinstance(source, str | None) or not isinstance(tool_source, str | None):
            raise InvalidModel("tokenizer.chat_template is not a string")
        return cls(source or tool_source or _CHATML, tool_source, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt, to be encoded with Tokenizer.encode(prompt, special=True): a BOS token that the tokenizer adds by
        itself is left out. messages: as in OpenAI's API (role, content, ...); content in text parts is joined by
        newlines, and where a template takes no system message, it goes in front of the user's, as in llama.cpp.
        extra: further variables of the template, such as enable_thinking.
        Raises InvalidPrompt when the template refuses the messages or fails on them.
        """
        source = self._sources[bool(tools)]
        plain = [_with_plain_content(message) for message in messages]
        variables = {"add_generation_prompt": add_generation_prompt, **self._tokens, **extra}
        if tools:
            variables["tools"] = tools
        try:
            prompt = self._run(source, {"messages": plain, **variables})
        except InvalidPrompt:
            merged = _without_system(plain)
            if merged is None:
                raise
            prompt = self._run(source, {"messages": merged, **variables})
        bos = self._tokens["bos_token"]
        return prompt.removeprefix(bos) if self._adds_bos else prompt

    def render_open(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """A prompt for more of the last message, whose content is a string: it ends where that content does.
        Raises InvalidPrompt like `render`, and when the template does not show the content."""
        *before, last = messages
        mark = secrets.token_hex(16)  # nobody can have said it before
        marked = {**last, "content": f"{last['content']}{mark}"}
        prompt, found, _ = self.render([*before, marked], add_generation_prompt=False, **extra).rpartition(mark)
        if not found:
            raise InvalidPrompt("the model's chat template does not show the last message, so it cannot be continued")
        return prompt

    def _run(self, source: str, variables: dict[str, Any]) -> str:
        try:
            with rendering():
                if source not in self._compiled:
                    self._compiled[source] = _ENVIRONMENT.from_string(source)
                return _joined(self._compiled[source].generate(variables))
        except jinja2.TemplateSyntaxError as error:
            raise InvalidPrompt(f"the model's chat template is broken at line {error.lineno}: {error}") from error
        except InvalidPrompt:
            raise
        except Exception as error:  # the template is code: it may raise anything
            raise InvalidPrompt(f"the model's chat template fails on these messages: {error}") from error


class _Generation(Extension):
    """{% generation %} marks, for training, what an assistant said; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _joined(pieces: Iterable[str]) -> str:
    text, size = [], 0
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        if size > _MAX_OUTPUT:
            raise InvalidPrompt(f"the model's chat template writes more than {_MAX_OUTPUT} characters")
    return "".join(text)


def _with_plain_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates that know no content in parts are many; all know strings."""
    content = message.get("content")
    if not isinstance(content, list) or not all(_is_text(part) for part in content):
        return dict(message)
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with a first system message put before the user's text; None where that cannot be done."""
    match messages:
        case [{"role": "system", "content": str(system)}, {"role": "user", "content": str(user)} as first, *others]:
            return [{**first, "content": f"{system}\n{user}"}, *others]
    return None


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse(message: object) -> None:
    raise InvalidPrompt(f"the model's chat template refuses these messages: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own would escape characters for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_json_list,
    )


def _json_list(value: Any) -> list[Any]:
    """Jinja's filters return iterators."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _make_environment() -> BoundedEnvironment:
    """With the options, filters and functions that transformers gives to templates, which models rely on."""
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", _Generation],
    )
    environment.filters.update(tojson=_to_json)
    environment.bound_filters()
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
    }
    environment.globals.update(functions)
    return environment


_ENVIRONMENT = _make_environment()
