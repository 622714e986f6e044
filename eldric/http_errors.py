"""Errors on the HTTP port: gRPC statuses as HTTP codes and JSON."""

import math
from typing import Any

import grpc
from starlette.responses import JSONResponse

from eldric.interceptors import Failure

_HTTP_CODES = {
    "OK": 200,
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 412,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


def http_code(status: str) -> int:
    """The HTTP code of a gRPC status by its name."""
    return _HTTP_CODES.get(status, 500)


def json_failure(failure: Failure) -> dict[str, Any]:
    """An error as JSON: {"code": HTTP code, "status": gRPC status, "message": text}."""
    status = failure.code.name
    return {"code": http_code(status), "status": status, "message": failure.message}


def error_response(failure: Failure) -> JSONResponse:
    """An error as JSON, with Retry-After (whole seconds) where trying again makes sense."""
    wait = failure.retry_after_s
    if wait is None and failure.code is grpc.StatusCode.UNAVAILABLE:
        wait = 1.0
    headers = {} if wait is None else {"retry-after": str(max(1, math.ceil(wait)))}
    return JSONResponse({"error": json_failure(failure)}, http_code(failure.code.name), headers)
