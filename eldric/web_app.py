"""The HTTP face of a node: its own routes, REST faces, /health, /metrics, and the description of it all."""

import logging
import ssl
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eldric.browsers import site_guards
from eldric.config import NodeConfig
from eldric.grpc_server import Service
from eldric.http_errors import error_response
from eldric.interceptors import CallGuard, failure_of
from eldric.metrics import render
from eldric.names import is_loopback
from eldric.openapi import describe, page
from eldric.readiness import Readiness
from eldric.rest import RestFace
from eldric.security.live import LiveIdentity

log = logging.getLogger(__name__)

#: Kinds whose HTTP port is for people and their programs, which have no certificate of the cluster.
PUBLIC_KINDS = ("router", "edge")


def http_tls(config: NodeConfig, live: LiveIdentity) -> ssl.SSLContext | None:
    """TLS of a node's HTTP port, None for plain HTTP.

    Controllers, workers and data workers take only callers with a certificate of this cluster. Routers and edges take
    anybody: without TLS on a loopback address, or elsewhere where the operator wants it so.
    """
    if config.kind not in PUBLIC_KINDS:
        return live.http_context(ssl.CERT_REQUIRED)
    if is_loopback(config.host):
        return None
    if config.insecure_http:
        log.warning("event=insecure_http host=%s: prompts and answers can be read on the way", config.host)
        return None
    return live.http_context(ssl.CERT_OPTIONAL)


def make_app(
    config: NodeConfig,
    metrics: CollectorRegistry,
    guard: CallGuard,
    readiness: Readiness,
    services: Sequence[Service],
    routes: Sequence[BaseRoute],
) -> Starlette:
    """The ASGI application of a node."""
    document = describe(f"Eldric {config.kind}", [each.descriptor for each in services])
    html = page(document)

    async def show_metrics(request: Request) -> Response:
        content, kind = render(metrics, request.headers.get("accept", ""))
        return Response(content, media_type=kind)

    async def show_openapi(request: Request) -> Response:
        return JSONResponse(document)

    async def show_docs(request: Request) -> Response:
        return HTMLResponse(html)

    face = RestFace(guard)
    return Starlette(
        routes=[
            *routes,
            Route("/health", readiness.answer),
            Route("/metrics", show_metrics),
            Route("/openapi.json", show_openapi),
            Route("/docs", show_docs),
            *(route for each in services for route in face.routes(each.servicer, each.descriptor)),
        ],
        middleware=[*(site_guards(config) if config.kind in PUBLIC_KINDS else []), Middleware(_Errors)],
        exception_handlers={HTTPException: _http_exception},
    )


async def _http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    status, message = "INVALID_ARGUMENT", error.detail
    if error.status_code == 404:
        status, message = "NOT_FOUND", f"nothing at {request.url.path}; GET /docs lists what there is"
    if error.status_code == 405:
        status, message = "UNIMPLEMENTED", f"{request.method} is not taken at {request.url.path}"
    content = {"error": {"code": error.status_code, "status": status, "message": message}}
    return JSONResponse(content, error.status_code, error.headers)


class _Errors:
    """Answers errors that routes let out, as REST does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun:
                raise
            await error_response(failure_of(error, str(scope.get("path"))))(scope, receive, send)
