"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

Shape: platform.openai.com/docs/guides/error-codes; a load's progress is an addition of ours.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from eldric.errors import NotSupported
from eldric.interceptors import failure_of
from eldric.router.errors import MAX_QUOTED, InvalidParameter, ModelNotFound, PipelineLoading, PromptTooLong

# gRPC status: HTTP code, type, code.
_KINDS: dict[str, tuple[int, str, str | None]] = {
    "INVALID_ARGUMENT": (400, "invalid_request_error", None),
    "OUT_OF_RANGE": (400, "invalid_request_error", None),
    "NOT_FOUND": (404, "invalid_request_error", "not_found"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": (503, "server_error", "unavailable"),
    "DEADLINE_EXCEEDED": (504, "server_error", "timeout"),
}

# Types of pydantic's errors: what was expected there.
_EXPECTED = {
    "string_type": "a string",
    "bool_type": "a boolean",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_JSON_NAMES = {
    "str": "a string",
    "bool": "a boolean",
    "int": "an integer",
    "float": "a number",
    "list": "an array",
    "dict": "an object",
    "NoneType": "null",
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error as its client sees it."""

    http_code: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    progress: float | None = None

    def as_json(self) -> dict[str, Any]:
        error: dict[str, Any] = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        if self.progress is not None:
            error["progress"] = round(self.progress, 4)
        return {"error": error}

    def response(self) -> JSONResponse:
        """With Retry-After, in whole seconds, where trying again makes sense."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.as_json(), self.http_code, headers)


def api_error(error: Exception, path: str) -> ApiError:
    """What a client learns of an error. One that nobody raised on purpose is logged, and named by a number only."""
    match error:
        case ValidationError():
            return _invalid(error)
        case InvalidParameter():
            return ApiError(error.http_code, str(error), "invalid_request_error", error.param, error.code)
        case ModelNotFound():
            return ApiError(404, str(error), "invalid_request_error", "model", "model_not_found")
        case PromptTooLong():
            return ApiError(400, str(error), "invalid_request_error", error.param, "context_length_exceeded")
        case NotSupported():
            return ApiError(400, str(error), "invalid_request_error", "model", "unsupported_model")
        case PipelineLoading():
            return ApiError(503, str(error), "server_error", None, "model_loading", error.retry_after_s, error.progress)
    failure = failure_of(error, path)
    http_code, kind, code = _KINDS.get(failure.code.name, (500, "server_error", "internal_error"))
    retry_after_s = failure.retry_after_s
    if retry_after_s is None and http_code in (429, 503):
        retry_after_s = 1.0
    return ApiError(http_code, failure.message, kind, None, code, retry_after_s)


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False)[0]
    param, kind, value = _path(first["loc"]), first["type"], first["input"]
    code = "invalid_value"
    if kind == "missing":
        message, code = f"Missing required parameter: {param!r}.", "missing_required_parameter"
    elif kind in _EXPECTED:
        got = _JSON_NAMES.get(type(value).__name__, "something else")
        message, code = f"Invalid type for {param!r}: expected {_EXPECTED[kind]}, but got {got}.", "invalid_type"
    elif kind == "unserved":
        message, code = f"The parameter {param!r} is not supported here: {first['msg']}.", "unsupported_parameter"
    elif kind == "literal_error":
        expected = first.get("ctx", {}).get("expected", "another one")
        message = f"Invalid value for {param!r}: {quoted(value)}. Supported values are {expected}."
    else:
        reason = first["msg"].removeprefix("Input should be ")
        if kind.startswith(("greater_than", "less_than")):
            reason = f"a value {reason}"
        elif kind in ("too_short", "too_long"):
            bound = first["ctx"]["min_length" if kind == "too_short" else "max_length"]
            reason = f"at {'least' if kind == 'too_short' else 'most'} {bound} of them"
        message = f"Invalid value for {param!r}: {quoted(value)}. Expected {reason}."
    return ApiError(400, message, "invalid_request_error", param, code)


def _path(location: tuple[int | str, ...]) -> str:
    """ "messages[0].content" for ("messages", 0, "content")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path if len(path) <= MAX_QUOTED else path[: MAX_QUOTED - 1] + "…"


def quoted(value: Any) -> str:
    """A value of a body, short enough for a message."""
    if isinstance(value, dict | list):
        return _JSON_NAMES[type(value).__name__]
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value) if not isinstance(value, str) else repr(value[:MAX_QUOTED])
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"
