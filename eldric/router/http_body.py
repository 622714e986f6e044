"""Bodies of HTTP requests: read and parsed within limits, so that no body can hold up the event loop for long."""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from eldric.router.errors import InvalidParameter

Checked = TypeVar("Checked")

#: A body must be here within this time, in seconds.
READ_TIMEOUT_S = 60.0
#: Bodies up to this size are parsed on the event loop, which takes under a millisecond.
SMALL_BYTES = 32 * 1024
#: JSON is parsed without letting other threads run: about 1 us for a list or an object, 0.2 us for another value.
MAX_CONTAINERS = 50_000
MAX_VALUES = 2_000_000

#: A string, or what is there of one that does not end: never a mismatch, so that time is linear.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


async def read_body(
    request: Request, limit: int, executor: Executor, check: Callable[[dict[str, Any]], Checked]
) -> Checked:
    """What `check` makes of the object in a request's body; a large one is parsed and checked in a thread.

    Raises InvalidParameter: 413 for a body of more than `limit` bytes, 408 for one that takes too long, 400 for one
    that is no JSON object. Raises ClientDisconnect.
    """
    body = await _read(request, limit)
    if len(body) <= SMALL_BYTES:
        return check(parse_object(body))
    return await asyncio.get_running_loop().run_in_executor(executor, lambda: check(parse_object(body)))


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        _refuse_size(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    _refuse_size(limit)
    except TimeoutError:
        raise InvalidParameter("The request's body did not arrive in time.", None, "timeout", 408) from None
    return bytes(body)


def _refuse_size(limit: int) -> NoReturn:
    raise InvalidParameter(f"The request's body is larger than {limit} bytes.", None, "request_too_large", 413)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidParameter when it is none, or too complex."""
    if _is_complex(body) and _is_complex(_STRING.sub(b"", body)):
        raise InvalidParameter(
            f"The body is too complex: at most {MAX_CONTAINERS} arrays and objects and {MAX_VALUES} values.",
            None,
            "request_too_large",
        )
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidParameter(f"The body is not valid JSON: {reason}", None, "invalid_json") from None
    if not isinstance(parsed, dict):
        raise InvalidParameter("The body must be a JSON object.", None, "invalid_json")
    return parsed


def _is_complex(json_text: bytes) -> bool:
    containers = json_text.count(b"[") + json_text.count(b"{")
    return containers > MAX_CONTAINERS or json_text.count(b",") > MAX_VALUES


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
