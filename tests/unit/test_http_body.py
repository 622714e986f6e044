"""Bodies of HTTP requests: limits, and JSON that is none or too much."""

import asyncio
import gzip
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.requests import Request

from eldric.router import http_body
from eldric.router.errors import InvalidParameter, RouterIsFull
from eldric.router.http_body import BodyReader, parse_object


def request_of(chunks: Iterable[bytes], headers: dict[str, str] | None = None) -> Request:
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    pending = iter(messages)

    async def receive() -> Any:
        return next(pending)

    raw = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


async def read(chunks: Iterable[bytes], limit: int = 1000, headers: dict[str, str] | None = None) -> Any:
    with ThreadPoolExecutor(1) as executor:
        return await BodyReader(limit, limit, executor).read(request_of(chunks, headers), lambda body: body)


async def test_a_body_comes_in_pieces() -> None:
    assert await read([b'{"a":', b" 1}"]) == {"a": 1}


async def test_a_large_body_is_parsed_as_well() -> None:
    text = "x" * (2 * http_body.SMALL_BYTES)
    assert await read([json.dumps({"a": text}).encode()], limit=10**6) == {"a": text}


async def test_a_body_over_the_limit_is_refused_before_its_end() -> None:
    with pytest.raises(InvalidParameter) as caught:
        await read([b"x" * 600, b"x" * 600])
    assert caught.value.http_code == 413


async def test_a_body_that_says_it_is_too_long_is_not_read() -> None:
    with pytest.raises(InvalidParameter) as caught:
        await read([], headers={"content-length": "1001"})
    assert caught.value.http_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
async def test_a_compressed_body_is_refused_with_what_to_do(encoding: str) -> None:
    with pytest.raises(InvalidParameter, match=r"compressed.*send it as it is") as caught:
        await read([gzip.compress(b"{}")], headers={"content-encoding": encoding})
    assert (caught.value.http_code, caught.value.code) == (415, "unsupported_content_encoding")
    assert await read([b"{}"], headers={"content-encoding": "Identity"}) == {}


async def test_a_body_of_another_type_is_read_where_it_is_json() -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert await read([b'{"a": 1}'], headers=form) == {"a": 1}
    with pytest.raises(
        InvalidParameter, match="'application/json' and not 'application/x-www-form-urlencoded'"
    ) as caught:
        await read([b"a=1"], headers=form)
    assert (caught.value.http_code, caught.value.code) == (415, "unsupported_content_type")
    with pytest.raises(InvalidParameter, match="not valid JSON") as caught:
        await read([b"a=1"], headers={"content-type": "application/json; charset=utf-8"})
    assert caught.value.http_code == 400


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "READ_TIMEOUT_S", 0.01)

    async def receive() -> Any:
        await asyncio.Event().wait()

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    with ThreadPoolExecutor(1) as executor, pytest.raises(InvalidParameter) as caught:
        await BodyReader(100, 100, executor).read(request, lambda body: body)
    assert caught.value.http_code == 408


def slow_request(first: bytes, rest: asyncio.Future[bytes]) -> Request:
    """A request whose body begins with `first` and ends with what `rest` brings."""

    async def pieces() -> Any:
        yield {"type": "http.request", "body": first, "more_body": True}
        yield {"type": "http.request", "body": await rest, "more_body": False}

    messages = pieces()
    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, lambda: anext(messages))


async def test_all_bodies_together_are_bounded_and_room_comes_back() -> None:
    with ThreadPoolExecutor(1) as executor:
        bodies = BodyReader(100, 150, executor)
        rest: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        slow = asyncio.ensure_future(bodies.read(slow_request(b'{"a": "' + b"x" * 90, rest), lambda body: body))
        while bodies.held_bytes != 97:
            await asyncio.sleep(0)
        with pytest.raises(RouterIsFull, match="request bodies of 150 bytes") as caught:
            await bodies.read(request_of([b"x" * 40, b"x" * 20]), lambda body: body)
        assert caught.value.retry_after_s > 0
        assert bodies.held_bytes == 97  # what had come of the refused one is given back
        assert await bodies.read(request_of([b'{"b": 1}']), lambda body: body) == {"b": 1}
        with pytest.raises(InvalidParameter):
            await bodies.read(request_of([b"{"]), lambda body: body)
        rest.set_result(b'"}')
        assert await slow == {"a": "x" * 90}
        assert bodies.held_bytes == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1} x',
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": ' + b"[" * 20_000,
        b'{"a": "\xff"}',
    ],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_object(body)
    assert (caught.value.http_code, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b'{"a":[' + b"[]," * 60_000 + b"1]}", b'{"a":[' + b"1," * 2_100_000 + b"1]}"])
def test_a_body_of_very_many_values_is_refused_unparsed(body: bytes) -> None:
    with pytest.raises(InvalidParameter, match="too complex"):
        parse_object(body)


def test_brackets_and_commas_in_a_text_do_not_count() -> None:
    text = '[{"a": 1},' * 60_000
    assert parse_object(json.dumps({"content": text}).encode()) == {"content": text}


def test_strings_that_do_not_end_are_looked_through_once() -> None:
    body = b"[" * 60_000 + b'"' + b'\\"' * 2_000_000
    began = time.process_time()
    with pytest.raises(InvalidParameter):
        parse_object(body)
    assert time.process_time() - began < 5
