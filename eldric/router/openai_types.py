"""What OpenAI's clients may send, checked: /v1/chat/completions, /v1/completions, and llama.cpp's /tokenize.

Fields: platform.openai.com/docs/api-reference; top_k, min_p, repeat_penalty, repeat_last_n, ignore_eos and -1 for "no
limit" are llama.cpp's. An explicit null is the same as a field that is not there. Fields that are not known are
ignored, as llama.cpp does; those that are known and would change the answer, but are not served, are refused.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, field_validator
from pydantic_core import PydanticCustomError

from eldric.errors import InvalidRequest
from eldric.router.errors import InvalidParameter
from eldric.router.generation import check_stop
from eldric.v1 import sampling_pb2

#: Generations that one request may ask for: choices times prompts.
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
_SMALLEST_TOP_P = 1e-6  # of 32 bits; keeps the most likely token only


class StrictBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _unicode(value: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("no_unicode", "valid Unicode: a surrogate stands alone") from None
    return value


Text = Annotated[str, AfterValidator(_unicode)]


def _as_stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """Content in parts is joined by newlines; parts other than text are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
        if kind not in ("text", "refusal"):
            raise PydanticCustomError("unsupported_part", "parts of type 'text': models here read text only")
        if not isinstance(text, str):
            raise PydanticCustomError("wrong_part", "parts that hold a string under 'text'")
        texts.append(text)
    return "\n".join(texts)


def as_prompts(value: Any, most: int = MAX_CHOICES) -> list[str | list[int]]:
    """A list of prompts, each a text or token ids; at most so many."""
    prompts = [value] if isinstance(value, str) or (value and _are(int, value)) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _are(int, p) for p in prompts):
        raise PydanticCustomError(
            "wrong_prompt", "a string, an array of strings, an array of token ids, or an array of arrays of token ids"
        )
    if len(prompts) > most:
        raise PydanticCustomError("too_many_prompts", f"at most {most} prompts")
    return [_unicode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _as_bias(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("wrong_bias", f"at most {MAX_LOGIT_BIAS} tokens")
    if isinstance(value, dict) and not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise PydanticCustomError("wrong_bias", "token ids as keys")
    return value


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-10, le=10)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(StrictBody):
    include_usage: bool | None = None


class Message(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(_as_text)] = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        """Templates know no "developer"."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


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
    ignore_eos: bool | None = None

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
    max_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def limit(self) -> int:
        """Most tokens to generate; 0 for as many as the context holds."""
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if given == 0:
            raise InvalidParameter("Expected at least 1 token, or -1 for no limit.", "max_tokens")
        return max(0, given or 0)

    @property
    def logprob_count(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameter("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    prompt: Annotated[list[str | list[int]], PlainValidator(as_prompts)]
    max_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def limit(self) -> int:
        """Most tokens to generate; 0 for as many as the context holds."""
        return max(0, self.max_tokens or 0)

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


def _is_empty(value: Any) -> bool:
    return value in ([], "", {}, "none", "auto")


#: Known parameters that are not served, and the values that ask for nothing and so are fine.
_UNSERVED: Mapping[str, Callable[[Any], bool]] = {
    "tools": _is_empty,
    "tool_choice": _is_empty,
    "functions": _is_empty,
    "function_call": _is_empty,
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "audio": _is_empty,
    "best_of": lambda value: value == 1,
    "suffix": _is_empty,
    "grammar": _is_empty,
    "json_schema": _is_empty,
    "structured_outputs": _is_empty,
    "web_search_options": lambda value: False,
}


def chat_body(body: Mapping[str, Any]) -> ChatBody:
    """Raises InvalidParameter, pydantic.ValidationError."""
    _refuse_unserved(body)
    return ChatBody.model_validate(body)


def completion_body(body: Mapping[str, Any]) -> CompletionBody:
    """Raises InvalidParameter, pydantic.ValidationError."""
    _refuse_unserved(body)
    return CompletionBody.model_validate(body)


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for name, is_harmless in _UNSERVED.items():
        value = body.get(name)
        if value is not None and not is_harmless(value):
            raise InvalidParameter(f"The parameter {name!r} is not supported here.", name, "unsupported_parameter")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise InvalidParameter("'stream_options' is only for requests with 'stream': true.", "stream_options")
