"""What OpenAI's clients may send, checked: /v1/chat/completions, /v1/completions, and llama.cpp's /tokenize.

Fields: platform.openai.com/docs/api-reference; of llama.cpp are top_k, min_p, repeat_penalty, repeat_last_n, n_predict,
ignore_eos and -1 for "no limit"; of vLLM stop_token_ids, repetition_penalty, add_special_tokens and what chats have of
their template. An explicit null is the same as a field that is not there. Fields that are not known are ignored, as
llama.cpp does; those that are known and would change the answer, but are not served, are refused.
docs/openai-api.md lists them all.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, field_validator
from pydantic_core import PydanticCustomError

from eldric.errors import InvalidRequest
from eldric.router import openai_unserved
from eldric.router.errors import InvalidParameter
from eldric.router.generation import check_stop
from eldric.router.openai_messages import Message, TemplateVariables
from eldric.router.openai_text import StrictBody, Text, TokenId, unicode
from eldric.router.openai_unserved import refuse_unserved
from eldric.router.prompts import Conversation
from eldric.v1 import sampling_pb2

#: Generations that one request may ask for: choices times prompts.
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 128
_SMALLEST_TOP_P = 1e-6  # of 32 bits; keeps the most likely token only
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


def _as_stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_prompts(value: Any, most: int = MAX_CHOICES) -> list[str | list[int]]:
    """A list of prompts, each a text or token ids; at most so many."""
    prompts = [value] if isinstance(value, str) or (value and _are(int, value)) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _are(int, p) for p in prompts):
        raise PydanticCustomError(
            "wrong_prompt", "a string, an array of strings, an array of token ids, or an array of arrays of token ids"
        )
    if len(prompts) > most:
        raise PydanticCustomError("too_many_prompts", f"at most {most} prompts")
    return [unicode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _as_bias(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("wrong_bias", f"at most {MAX_LOGIT_BIAS} tokens")
    if isinstance(value, dict) and not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise PydanticCustomError("wrong_bias", "token ids as keys")
    return value


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-10, le=10)]
Limit = Annotated[int, Field(ge=-1, lt=2**31)]


class StreamOptions(StrictBody):
    include_usage: bool | None = None


class GenerationBody(StrictBody):
    """What both endpoints take."""

    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[Annotated[list[Text], Field(fail_fast=True)] | None, BeforeValidator(_as_stop)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    logit_bias: Annotated[dict[str, Bias] | None, BeforeValidator(_as_bias)] = None
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = None
    n_predict: Limit | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        try:
            return list(check_stop(value))
        except InvalidRequest as error:
            raise PydanticCustomError("wrong_stop", "{reason}", {"reason": str(error)}) from None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def limited_by(self) -> tuple[str, int | None]:
        """The parameter that bounds the answer, and its tokens: 0 for none at all, -1 or None for no bound."""
        names = ("max_completion_tokens", "max_tokens", "n_predict")
        name = next((each for each in names if getattr(self, each) is not None), "max_tokens")
        return name, getattr(self, name)

    @property
    def limit(self) -> int:
        """Most tokens to generate; 0 for as many as the context holds."""
        return max(0, self.limited_by[1] or 0)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, logprobs: int | None) -> sampling_pb2.SamplingParams:
        """The parameters without the seed; what was not given stays absent."""
        made = sampling_pb2.SamplingParams(
            temperature=self.temperature,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repeat_penalty if self.repeat_penalty is not None else self.repetition_penalty,
            penalty_last_n=self.repeat_last_n,
            logprobs=logprobs,
        )
        if self.top_k is not None:
            made.top_k = max(0, self.top_k)
        if self.top_p is not None:
            made.top_p = max(_SMALLEST_TOP_P, self.top_p)
        for token, bias in (self.logit_bias or {}).items():
            made.logit_bias[int(token)] = bias
        return made

    @property
    def seed_bits(self) -> int | None:
        """64 bits; None for a random seed, which llama.cpp spells -1."""
        return None if self.seed is None or self.seed == -1 else self.seed % 2**64


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Text | None = None

    @property
    def limit(self) -> int:
        name, given = self.limited_by
        if given == 0:
            raise InvalidParameter("Expected at least 1 token, or -1 for no limit.", name)
        return super().limit

    @property
    def logprob_count(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameter("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> Conversation:
        """A last message of the assistant is continued, as by llama.cpp and Ollama, unless vLLM's parameters say
        otherwise."""
        last, opens = self.messages[-1], self.add_generation_prompt
        if self.continue_final_message and (opens or last.role != "assistant"):
            reason = "not together with 'add_generation_prompt'" if opens else "only after a message of the assistant"
            raise InvalidParameter(f"'continue_final_message' can be true {reason}.", "continue_final_message")
        continues = self.continue_final_message or (self.continue_final_message is None and opens is None)
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return Conversation(
            messages=[message.for_template() for message in self.messages],
            continues=continues and last.role == "assistant" and bool(last.text),
            opens=opens is not False,
            variables=effort | (self.chat_template_kwargs or {}),
        )


class CompletionBody(GenerationBody):
    prompt: Annotated[list[str | list[int]], PlainValidator(as_prompts)]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def logprob_count(self) -> int | None:
        if self.logprobs is not None and self.echo:
            raise InvalidParameter("Logprobs of the prompt are not served: leave out 'echo' or 'logprobs'.", "echo")
        return self.logprobs


class TokenizeBody(StrictBody):
    model: Text | None = None
    content: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(StrictBody):
    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def chat_body(body: Mapping[str, Any]) -> ChatBody:
    """Raises InvalidParameter, pydantic.ValidationError."""
    refuse_unserved(body, openai_unserved.CHAT)
    _check_stream_options(body)
    return ChatBody.model_validate(body)


def completion_body(body: Mapping[str, Any]) -> CompletionBody:
    """Raises InvalidParameter, pydantic.ValidationError."""
    refuse_unserved(body, openai_unserved.COMPLETION)
    _check_stream_options(body)
    return CompletionBody.model_validate(body)


def _check_stream_options(body: Mapping[str, Any]) -> None:
    if body.get("stream_options") is not None and not body.get("stream"):
        raise InvalidParameter("'stream_options' is only for requests with 'stream': true.", "stream_options")
