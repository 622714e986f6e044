"""Whether a node is ready for work: /health, and grpc.health.v1."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health, health_pb2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

#: Tells whether a part is ready, and what /health shows of it.
HealthCheck = Callable[[], tuple[bool, dict[str, Any]]]

#: How often watchers of grpc.health.v1 are told of a change, in seconds.
WATCH_INTERVAL_S = 0.5

log = logging.getLogger(__name__)


class Readiness:
    """Asks all checks; a node that drains is not ready."""

    def __init__(self, kind: str, name: str) -> None:
        self.draining = False
        self.servicer = _Health(self)
        self._kind, self._name = kind, name
        self._checks: list[HealthCheck] = []

    def add(self, check: HealthCheck) -> None:
        self._checks.append(check)

    def look(self) -> tuple[bool, dict[str, Any]]:
        """Whether the node is ready, and the details of all checks. A check that raises is not ready."""
        ready, details = not self.draining, {}
        for check in self._checks:
            try:
                good, more = check()
            except Exception as error:
                log.exception("event=health_check_failed")
                good, more = False, {"error": type(error).__name__}
            ready = ready and good
            details.update(more)
        return ready, details

    async def answer(self, request: Request) -> Response:
        """GET /health: 200 when ready, 503 when not."""
        ready, details = self.look()
        status = "draining" if self.draining else "ok" if ready else "not ready"
        content = {"status": status, "ready": ready, "kind": self._kind, "name": self._name, **details}
        return JSONResponse(content, 200 if ready else 503)

    async def watch(self) -> None:
        """Keeps grpc.health.v1's watchers informed, for ever."""
        while True:
            await self.servicer.refresh()
            await asyncio.sleep(WATCH_INTERVAL_S)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """The health of the node as a whole (service "")."""

    def __init__(self, readiness: Readiness) -> None:
        super().__init__()
        self._readiness = readiness

    async def refresh(self) -> None:
        ready, _ = self._readiness.look()
        status = health_pb2.HealthCheckResponse
        await self.set("", status.SERVING if ready else status.NOT_SERVING)

    async def Check(self, request: Any, context: Any) -> Any:
        await self.refresh()
        return await super().Check(request, context)
