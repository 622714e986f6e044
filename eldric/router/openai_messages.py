"""Messages of /v1/chat/completions, and what else a chat template reads.

Fields: platform.openai.com/docs/api-reference/chat; reasoning_content is llama.cpp's and vLLM's.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from eldric.router.openai_text import StrictBody, Text, unicode


def _as_text(value: Any) -> Any:
    """Content in parts is joined by newlines; parts other than text are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "unsupported_part",
                "parts of type 'text': models here read text only, and part {index} is something else",
                {"index": index},
            )
        if not isinstance(part.get(kind), str):
            raise PydanticCustomError(
                "wrong_part",
                "parts that hold a string under '{kind}', as part {index} does not",
                {"kind": kind, "index": index},
            )
        texts.append(part[kind])
    return "\n".join(texts)


def _refuse(value: Any) -> None:
    if value not in (None, []):
        raise PydanticCustomError("unserved", "models here call no tools and read text only")


#: What a message may only have where it says nothing.
_Unserved = Annotated[None, BeforeValidator(_refuse)]


class Message(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(_as_text), Field(validate_default=True)] = None
    name: Text | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    tool_calls: _Unserved = None
    function_call: _Unserved = None
    audio: _Unserved = None

    @field_validator("content")
    @classmethod
    def _only_assistants_are_silent(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("no_content", "a string, or an array of parts of type 'text'")
        return value

    @property
    def text(self) -> str:
        return self.content if self.content is not None else self.refusal or ""

    def for_template(self) -> dict[str, str]:
        """Templates know no "developer"; what else they read of a message, few of them do."""
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return {"role": role, "content": self.text, **{key: value for key, value in more.items() if value is not None}}


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    """Anything but what a rendering sets itself."""
    if not all(name.isidentifier() and name not in _SET_HERE for name in value):
        raise PydanticCustomError(
            "wrong_variable", "names of variables other than {names}", {"names": ", ".join(_SET_HERE)}
        )
    try:
        unicode(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise PydanticCustomError("too_deep", "values that are nested less deeply") from None
    return value


_SET_HERE = ("self", "messages", "tools", "add_generation_prompt", "bos_token", "eos_token")

TemplateVariables = Annotated[dict[str, Any], AfterValidator(_variables)]
