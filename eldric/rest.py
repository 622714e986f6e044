"""REST faces of gRPC services, by the google.api.http options of their methods.

A request's path variables, query parameters and JSON body fill the method's request message; the servicer is called
in this process. A unary answer is a JSON object. A stream is server-sent events, one JSON object each and a last
`event: error` when it fails, or, for callers that accept application/json, one array of all its messages.
Errors are {"error": {"code": HTTP code, "status": gRPC status, "message": text}}.

Mapping of options: google/api/http.proto. JSON: eldric.json_messages.
"""

import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eldric.errors import EldricError, InvalidRequest, NotEnoughMemory, PermissionDenied
from eldric.event_stream import ClientGone, EventStream, disconnected, unless_gone
from eldric.http_errors import error_response, http_code
from eldric.interceptors import Aborted, CallFailed, CallGuard, checked_request, failure_of
from eldric.json_messages import from_json, set_text, to_json
from eldric.security.access import Caller
from eldric.web import http_caller

#: Largest body of a request, and of a stream that is sent as one array, in bytes.
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_ARRAY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Binding:
    """One HTTP method and path of a gRPC method. `body`: "*", the name of a field, or "" for none."""

    method: MethodDescriptor
    verb: str
    path: str
    body: str
    response_body: str

    @property
    def full_name(self) -> str:
        """ "/package.Service/Method"."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def variables(self) -> list[str]:
        return [name for name, _ in _VARIABLE.findall(self.path)]


_VARIABLE = re.compile(r"\{([a-zA-Z0-9_.]+)(?:=(\*\*?))?\}")


def bindings_of(descriptor: ServiceDescriptor) -> list[Binding]:
    """The REST face of a service, in the order of its methods."""
    made: list[Binding] = []
    for method in descriptor.methods:
        options = method.GetOptions()
        if options.HasExtension(annotations_pb2.http):
            rule = options.Extensions[annotations_pb2.http]
            made.extend(_binding(method, each) for each in (rule, *rule.additional_bindings))
    return made


def _binding(method: MethodDescriptor, rule: http_pb2.HttpRule) -> Binding:
    verb = rule.WhichOneof("pattern")
    if verb is None:
        raise ValueError(f"{method.full_name}: its http option has no path")
    if verb == "custom":
        return Binding(method, rule.custom.kind.upper(), rule.custom.path, rule.body, rule.response_body)
    return Binding(method, verb.upper(), getattr(rule, verb), rule.body, rule.response_body)


class RestContext:
    """What a servicer may use of its context when it is called over REST: these members, and no others."""

    def __init__(self, request: Request) -> None:
        #: Whose certificate the connection showed; None for a stranger. `eldric.security.caller_of` reads it.
        self.caller: Caller | None = http_caller(request)
        self._request = request
        self._gone = False

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """Ends the call with an error. Raising an EldricError says the same."""
        raise Aborted(code, details)

    def cancelled(self) -> bool:
        """Whether the client went away. The call's task is cancelled then, too."""
        return self._gone

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The request's headers, names in lower case."""
        return tuple(self._request.headers.items())

    def time_remaining(self) -> float | None:
        """No deadline: the client ends the call by going away."""
        return None

    def peer(self) -> str:
        client = self._request.client
        return f"{client.host}:{client.port}" if client else "unknown"

    async def until_gone(self) -> None:
        """Returns when the client went away. For the face itself, after the body was read."""
        await disconnected(self._request)
        self._gone = True


class Call:
    """A request whose body was read, and the context that its servicer gets."""

    def __init__(self, request: Request, body: bytes) -> None:
        self.request, self.body = request, body
        self.context = RestContext(request)


class RestFace:
    """The routes of services over HTTP."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard

    def routes(self, servicer: Any, descriptor: ServiceDescriptor) -> list[Route]:
        """Routes for `servicer`, paths without variables first."""
        bindings = sorted(bindings_of(descriptor), key=lambda binding: len(binding.variables))
        return [
            Route(_starlette_path(each.path), self._endpoint(servicer, each), methods=[each.verb]) for each in bindings
        ]

    def _endpoint(self, servicer: Any, binding: Binding) -> Callable[[Request], Awaitable[Response]]:
        behaviour = getattr(servicer, binding.method.name)
        answer = self._answer_stream if binding.method.server_streaming else self._answer_unary

        async def endpoint(request: Request) -> Response:
            try:
                return await answer(behaviour, binding, Call(request, await _read_body(request)))
            except CallFailed as error:
                return error_response(error.failure)
            except EldricError as error:
                return error_response(failure_of(error, binding.full_name))
            except ClientGone:
                return Response(status_code=http_code("CANCELLED"))  # nobody reads it

        return endpoint

    async def _answer_unary(self, behaviour: Any, binding: Binding, call: Call) -> Response:
        async def answer() -> Message:
            async with self._guarded(binding, call) as message:
                made: Message = await behaviour(message, call.context)
                return made

        return JSONResponse(_shown(binding, await unless_gone(answer(), call.context.until_gone())))

    async def _answer_stream(self, behaviour: Any, binding: Binding, call: Call) -> Response:
        async def answers() -> AsyncGenerator[Any, None]:
            async with (
                self._guarded(binding, call) as message,
                contextlib.aclosing(behaviour(message, call.context)) as messages,
            ):
                async for each in messages:
                    yield _shown(binding, each)

        accept = call.request.headers.get("accept", "")
        if "application/json" in accept and "text/event-stream" not in accept:
            return JSONResponse(await unless_gone(_collect(answers()), call.context.until_gone()))
        return await EventStream.begin(answers(), call.context.until_gone)

    @contextlib.asynccontextmanager
    async def _guarded(self, binding: Binding, call: Call) -> AsyncIterator[Message]:
        caller = call.context.caller
        async with self._guard.call("rest", binding.full_name, caller) as rule:
            yield checked_request(rule, caller, read_request(binding, call.request, call.body))


async def _collect(answers: AsyncGenerator[Any, None]) -> list[Any]:
    made: list[Any] = []
    size = 0
    async with contextlib.aclosing(answers):
        async for answer in answers:
            size += len(json.dumps(answer))
            if size > MAX_ARRAY_BYTES:
                raise NotEnoughMemory(
                    f"the answer is larger than {MAX_ARRAY_BYTES} bytes: accept text/event-stream instead"
                )
            made.append(answer)
    return made


def read_request(binding: Binding, request: Request, body: bytes) -> Message:
    """The request message of a call. Raises InvalidRequest that names what is unknown, missing or of a wrong kind."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin", "same-site"):
        raise PermissionDenied("another site's page may not make calls here")
    message = GetMessageClass(binding.method.input_type)()
    if binding.body == "*":
        from_json(body, message)
    elif binding.body:
        from_json(body, getattr(message, binding.body))
    elif body.strip():
        raise InvalidRequest(f"{binding.verb} {binding.path} takes no body")
    query = request.query_params
    if binding.body == "*" and query:
        raise InvalidRequest(f"{binding.verb} {binding.path} takes a JSON body, no query parameters")
    for name in query:
        set_text(message, name, query.getlist(name))
    for name in binding.variables:
        set_text(message, name, [request.path_params[_identifier(name)]])
    return message


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _shown(binding: Binding, message: Message) -> Any:
    made = to_json(message)
    return made.get(binding.response_body) if binding.response_body else made


def _identifier(variable: str) -> str:
    return variable.replace(".", "__")


def _starlette_path(path: str) -> str:
    def convert(found: re.Match[str]) -> str:
        return "{" + _identifier(found[1]) + (":path}" if found[2] == "**" else "}")

    return _VARIABLE.sub(convert, path)
