"""Bodies of HTTP requests: read and parsed within limits, so that no body can hold up the event loop for long."""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from eldric.router.errors import InvalidParameter, RouterIsFull

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


class BodyReader:
    """Reads the bodies of all requests of a router."""

    def __init__(self, limit_bytes: int, total_bytes: int, executor: Executor) -> None:
        """limit_bytes: of one body. total_bytes: of all bodies that are being read and parsed."""
        self._limit = limit_bytes
        self._total = total_bytes
        self._executor = executor
        self.held_bytes = 0

    async def read(self, request: Request, check: Callable[[dict[str, Any]], Checked]) -> Checked:
        """What `check` makes of the object in a request's body; a large one is parsed and checked in a thread.

        Raises InvalidParameter: 413 for a body that is too large, 408 for one that takes too long, 415 for one that is
        compressed or of another kind, 400 for one that is no JSON object.
        Raises RouterIsFull when the bodies of other requests leave no room for it, ClientDisconnect.
        """
        _check_encoding(request.headers.get("content-encoding", ""))
        content_type = request.headers.get("content-type", "")

        def checked() -> Checked:
            return check(parse_object(bytes(body), content_type))

        body = bytearray()
        try:
            await self._read(request, body)
            if len(body) <= SMALL_BYTES:
                return checked()
            return await asyncio.get_running_loop().run_in_executor(self._executor, checked)
        finally:
            self.held_bytes -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Appends what comes to `body`, whose bytes are held, all of them, whatever is raised."""
        declared = request.headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._limit:
            self._refuse_size()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self._limit:
                        self._refuse_size()
                    if self.held_bytes + len(chunk) > self._total:
                        raise RouterIsFull(
                            f"this router holds request bodies of {self._total} bytes at once, and they are being read"
                        )
                    body += chunk
                    self.held_bytes += len(chunk)
        except TimeoutError:
            raise InvalidParameter("The request's body did not arrive in time.", None, "timeout", 408) from None

    def _refuse_size(self) -> NoReturn:
        message = f"The request's body is larger than {self._limit} bytes."
        raise InvalidParameter(message, None, "request_too_large", 413)


def _check_encoding(encoding: str) -> None:
    """Compressed bodies unpack beyond every bound."""
    if encoding.strip().lower() not in ("", "identity"):
        message = f"The body is compressed ({encoding[:80]!r}): send it as it is, without a Content-Encoding."
        raise InvalidParameter(message, None, "unsupported_content_encoding", 415)


def parse_object(body: bytes, content_type: str = "") -> dict[str, Any]:
    """The JSON object in `body`, whatever its type is said to be: curl, for one, says that all it sends is a form.
    Raises InvalidParameter when it is none, or too complex."""
    if _is_complex(body) and _is_complex(_STRING.sub(b"", body)):
        raise InvalidParameter(
            f"The body is too complex: at most {MAX_CONTAINERS} arrays and objects and {MAX_VALUES} values.",
            None,
            "request_too_large",
        )
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if content_type and "json" not in content_type.lower():
            message = f"The body must be JSON, of the content type 'application/json' and not {content_type[:80]!r}."
            raise InvalidParameter(message, None, "unsupported_content_type", 415) from None
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise InvalidParameter(f"The body is not valid JSON: {reason}", None, "invalid_json") from None
    if not isinstance(parsed, dict):
        raise InvalidParameter("The body must be a JSON object.", None, "invalid_json")
    return parsed


def _is_complex(json_text: bytes) -> bool:
    containers = json_text.count(b"[") + json_text.count(b"{")
    return containers > MAX_CONTAINERS or json_text.count(b",") > MAX_VALUES


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
