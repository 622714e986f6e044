"""Keeps web pages of other sites from using a node through the browser of somebody who may reach it.

A browser says which site a request comes from: Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/), or Origin where
it leaves that out, as it does for plain HTTP at addresses other than localhost. A site whose name leads to 127.0.0.1
(DNS rebinding) counts as the same one for the browser, but is still named by the Host header.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from eldric.config import NodeConfig
from eldric.errors import PermissionDenied
from eldric.http_errors import error_response
from eldric.interceptors import failure_of
from eldric.names import is_loopback

#: What a request may say of where it comes from: the user itself, or a page of this site.
_OWN = ("none", "same-origin", "same-site")
#: Names that nobody can have on the internet.
_PRIVATE = (".localhost", ".local", ".internal")
_SAFE = ("GET", "HEAD", "OPTIONS")


def site_guards(config: NodeConfig) -> list[Middleware]:
    """From the outside in: what lets pages of allowed sites read answers (CORS, https://fetch.spec.whatwg.org/), and
    what keeps the others' calls out."""
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=config.allow_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=("retry-after", "x-request-id", "x-eldric-pipeline"),
    )
    return [*([cross_origin] if config.allow_origins else []), Middleware(SiteGuard, config)]


class SiteGuard:
    """Around an application that people reach without a certificate."""

    def __init__(self, app: ASGIApp, config: NodeConfig) -> None:
        self._app = app
        self._allowed = config.allow_origins
        self._names = {config.advertised_host.lower(), socket.gethostname().lower()}
        self._only_here = is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope["method"], Headers(scope=scope))):
            failure = failure_of(PermissionDenied(problem), scope["path"])
            await error_response(failure)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, method: str, headers: Headers) -> str:
        """What is wrong with a request's origin; empty: nothing."""
        host = headers.get("host", "")
        if self._only_here and not self._is_own(host):
            return (
                f"this node is for its own machine and is not called {host[:200]!r}: use localhost, "
                "or start it with --advertise and that name"
            )
        origin = headers.get("origin")
        if "*" in self._allowed or origin in self._allowed:
            return ""
        if method not in _SAFE and _is_foreign(origin, headers.get("sec-fetch-site"), host):
            return "another site's page may not make calls here, unless its origin is given with --allow-origin"
        return ""

    def _is_own(self, host: str) -> bool:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        return "." not in name or name in self._names or name.endswith(_PRIVATE) or _is_address(name)


def _is_foreign(origin: str | None, site: str | None, host: str) -> bool:
    """Whether a page of another site makes the call. Programs say nothing of a site, or one that is no web site."""
    if site in _OWN:
        return False
    if origin is None:
        return site is not None
    scheme, _, where = origin.partition("://")
    return origin == "null" or (scheme in ("http", "https") and where.lower() != host.lower())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
