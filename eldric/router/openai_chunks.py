"""OpenAI's answers as bytes: whole ones and the chunks of a stream, for chat and for plain completions.

Shapes: platform.openai.com/docs/api-reference (chat/object, chat/streaming, completions/object). A chunk of a stream is
made once per token, so only its text and logprobs go through the JSON encoder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eldric.router.generation import Delta, Finished, Token
from eldric.router.openai_logprobs import ChatLogprobs, CompletionLogprobs

DONE = b"data: [DONE]\n\n"
_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop"}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True)
class Choice:
    """One generation of a request, as far as it has come."""

    index: int
    prompt: int  # which of the request's prompts it continues
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    text: list[str] = field(default_factory=list)  # of an answer that is not streamed
    finished: Finished | None = None


def total_usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Each prompt counts once, however many choices continue it."""
    ended = [(choice.prompt, choice.finished) for choice in choices if choice.finished is not None]
    prompt_tokens = sum({prompt: finished.prompt_tokens for prompt, finished in ended}.values())
    completion_tokens = sum(finished.completion_tokens for _, finished in ended)
    cached_tokens = sum({prompt: finished.cached_tokens for prompt, finished in ended}.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def settled_at_end(finished: Finished) -> int | None:
    """All tokens are out at the end, but those of a stop string."""
    return 0 if finished.stop else None


def _released(choice: Choice, tokens: Sequence[Token], settled: int | None) -> str:
    """Logprobs of the tokens whose text is out, as JSON: "null" for none."""
    released = None if choice.logprobs is None else choice.logprobs.release(tokens, settled)
    return _encode(released) if released else "null"


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, envelope: dict[str, Any], include_usage: bool) -> None:
        """envelope: id, created, model, system_fingerprint."""
        self.id = str(envelope["id"])
        self._envelope = envelope
        fields = _encode({**envelope, "object": self.chunk_kind})[:-1]
        self._before = f'data: {fields},"choices":['.encode()
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def first(self, choice: Choice) -> bytes:
        """The chunk that begins a choice."""
        return self._chunk(choice, '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null')

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        """A chunk of text; empty when there is nothing to show yet."""
        logprobs = _released(choice, delta.tokens, delta.settled)
        if not delta.text and logprobs == "null":
            return b""
        return self._chunk(choice, self._content(delta.text, logprobs, "null"))

    def finish(self, choice: Choice, finished: Finished) -> bytes:
        """The chunk that ends a choice."""
        logprobs = _released(choice, (), settled_at_end(finished))
        return self._chunk(choice, self._content("", logprobs, f'"{_REASONS[finished.reason]}"'))

    def usage(self, choices: Sequence[Choice]) -> bytes:
        """The chunk with empty choices that ends a stream when stream_options.include_usage is set."""
        return self._before + b'],"usage":' + _encode(total_usage(choices)).encode() + b"}\n\n"

    def answer(self, choices: Sequence[Choice]) -> bytes:
        """A whole answer."""
        made = [self._whole(choice) for choice in choices]
        return _encode({**self._envelope, "object": self.kind, "choices": made, "usage": total_usage(choices)}).encode()

    def _content(self, text: str, logprobs: str, reason: str) -> str:
        delta = f'{{"content":{_encode(text)}}}' if text or reason == "null" else "{}"
        return f'"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}'

    def _whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": None if choice.logprobs is None else choice.logprobs.whole(),
            "finish_reason": _REASONS[choice.finished.reason] if choice.finished else None,
        }

    def _chunk(self, choice: Choice, fields: str) -> bytes:
        return b'%b{"index":%d,%b}%b' % (self._before, choice.index, fields.encode(), self._after)


class CompletionFormat(ChatFormat):
    """text_completion, whose chunks have the same kind."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, envelope: dict[str, Any], include_usage: bool, echo: Sequence[str] = ()) -> None:
        """echo: the prompts, when answers are to begin with them."""
        super().__init__(envelope, include_usage)
        self._echo = tuple(echo)

    def first(self, choice: Choice) -> bytes:
        echo = self._echo[choice.prompt] if self._echo else ""
        return self._chunk(choice, self._content(echo, "null", "null")) if echo else b""

    def _content(self, text: str, logprobs: str, reason: str) -> str:
        return f'"text":{_encode(text)},"logprobs":{logprobs},"finish_reason":{reason}'

    def _whole(self, choice: Choice) -> dict[str, Any]:
        echo = self._echo[choice.prompt] if self._echo else ""
        return {
            "index": choice.index,
            "text": echo + "".join(choice.text),
            "logprobs": None if choice.logprobs is None else choice.logprobs.whole(),
            "finish_reason": _REASONS[choice.finished.reason] if choice.finished else None,
        }
