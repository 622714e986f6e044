"""Web pages that use a router through the browser of somebody on its machine."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from eldric.errors import InvalidRequest
from eldric.security import Authority
from tests.nodes import make_node, running


@contextlib.asynccontextmanager
async def router(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A node that people reach without a certificate, with something to call."""

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"said": (await request.body()).decode()})

    node = make_node(folder, Authority.create("demo"), "router", **settings)
    node.routes([Route("/v1/completions", answer, methods=["GET", "POST"])])
    async with running(node):
        here = f"http://127.0.0.1:{node.http_url.rpartition(':')[2]}"
        async with httpx.AsyncClient(base_url=here, trust_env=False) as client:
            yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://evil.example"},  # to 0.0.0.0 or an address of the network: browsers say no more
        {"origin": "null"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://localhost:1", "sec-fetch-site": "cross-site"},
    ],
)
async def test_another_sites_page_makes_no_calls(tmp_path: Path, headers: dict[str, str]) -> None:
    async with router(tmp_path) as client:
        answer = await client.post("/v1/completions", content="{}", headers={"content-type": "text/plain", **headers})
        assert answer.status_code == 403
        assert answer.json()["error"]["message"].startswith("another site's page may not make calls here")
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:9880", "127.0.0.1.evil.example", "localhost.evil.example"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_name_that_was_made_to_lead_here_reads_nothing(tmp_path: Path, name: str, method: str) -> None:
    async with router(tmp_path) as client:
        for path in ("/v1/completions", "/metrics", "/health"):
            answer = await client.request(method, path, headers={"host": name, "origin": f"http://{name}"})
            assert answer.status_code == 403
            assert "is not called" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program
        {"host": "localhost:9880"},
        {"host": "[::1]:9880"},
        {"host": "gpu-box"},
        {"host": "host.docker.internal:9880"},
        {"host": "llm.example.org"},  # as the operator says
        {"sec-fetch-site": "same-origin", "origin": "https://llm.example.org"},  # behind a proxy
        {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
        {"sec-fetch-site": "none"},
        {"host": "localhost:9880", "origin": "http://localhost:9880"},
        {"sec-fetch-site": "cross-site", "origin": "app://obsidian.md"},  # a program that is made like a browser
    ],
)
async def test_the_machines_own_people_and_programs_are_served(tmp_path: Path, headers: dict[str, str]) -> None:
    async with router(tmp_path, advertise="llm.example.org") as client:
        answer = await client.post("/v1/completions", content="hello", headers=headers)
        assert answer.json() == {"said": "hello"}


async def test_a_link_from_another_site_may_be_followed(tmp_path: Path) -> None:
    async with router(tmp_path) as client:
        answer = await client.get("/docs", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
        assert answer.status_code == 200


async def test_a_router_of_a_network_is_called_whatever_its_operator_likes(tmp_path: Path) -> None:
    async with router(tmp_path, host="0.0.0.0", advertise="127.0.0.1", insecure_http=True) as client:
        answer = await client.post("/v1/completions", content="x", headers={"host": "llm.lan.example.org"})
        assert answer.status_code == 200


CHAT = "https://chat.example.org"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


async def test_pages_of_no_other_site_may_ask_unless_the_operator_says_so(tmp_path: Path) -> None:
    async with router(tmp_path) as client:
        asked = await client.options("/v1/completions", headers={"origin": CHAT, **PREFLIGHT})
        assert asked.status_code == 405
        assert not [name for name in asked.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("allowed", "named"), [((CHAT, "http://localhost:3000"), CHAT), (("*",), "*")])
async def test_pages_of_allowed_sites_call_and_read_answers(
    tmp_path: Path, allowed: tuple[str, ...], named: str
) -> None:
    async with router(tmp_path, allow_origins=allowed) as client:
        page = {"origin": CHAT, "sec-fetch-site": "cross-site"}
        asked = await client.options(
            "/v1/completions", headers={**page, **PREFLIGHT, "access-control-request-private-network": "true"}
        )
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, named)
        assert asked.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        assert asked.headers["access-control-allow-private-network"] == "true"
        answer = await client.post("/v1/completions", content="hello", headers=page)
        assert (answer.json(), answer.headers["access-control-allow-origin"]) == ({"said": "hello"}, named)
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        failed = await client.post("/nothing", content="", headers=page)
        assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (404, named), (
            "errors are read too"
        )


@pytest.mark.parametrize(
    "origin", ["https://evil.example", f"{CHAT}.evil.example", f"{CHAT}:8443", "http://chat.example.org", "null"]
)
async def test_an_allowed_site_opens_the_door_to_no_other(tmp_path: Path, origin: str) -> None:
    async with router(tmp_path, allow_origins=(CHAT,)) as client:
        page = {"origin": origin, "sec-fetch-site": "cross-site"}
        asked = await client.options("/v1/completions", headers={**page, **PREFLIGHT})
        answer = await client.post("/v1/completions", content="x", headers=page)
        assert (asked.status_code, answer.status_code) == (400, 403)
        assert "access-control-allow-origin" not in {*asked.headers, *answer.headers}


async def test_an_allowed_site_does_not_lend_its_name_to_another_address(tmp_path: Path) -> None:
    async with router(tmp_path, allow_origins=(CHAT,)) as client:
        answer = await client.post("/v1/completions", content="x", headers={"origin": CHAT, "host": "evil.example"})
        assert answer.status_code == 403


@pytest.mark.parametrize("origin", ["", "chat.example.org", f"{CHAT}/", "https://Chat.example.org", "https://", "null"])
def test_what_is_no_origin_is_refused_at_the_start(tmp_path: Path, origin: str) -> None:
    with pytest.raises(InvalidRequest, match="is no origin: it looks like https://"):
        make_node(tmp_path, Authority.create("demo"), "router", allow_origins=(origin,))
