"""Around every call: who may make it, what its errors become, and how it is counted.

`CallGuard` does this for both faces; `CallInterceptor` applies it to gRPC, eldric.rest to REST.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from eldric.channels import ERROR_KEY, RETRY_KEY, error_from_rpc
from eldric.errors import EldricError, NotEnoughMemory
from eldric.metrics import CallMetrics
from eldric.security.access import Caller, Rule, authorise, find_caller
from eldric.security.expelled import Expelled

log = logging.getLogger(__name__)

#: Bytes of an error's message: it travels in HTTP/2 headers, which are bounded.
MAX_MESSAGE_BYTES = 3000

#: Errors of a system that has no more memory, open files or room on a disk.
_EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)

#: Streams that last as long as their caller wants: a node that ends does not wait for them.
_ENDLESS = ("/Watch", "/Beat", "/Open", "/ServerReflectionInfo")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a caller sees it."""

    code: grpc.StatusCode
    message: str
    error: str = ""
    retry_after_s: float | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Trailing metadata: the error's class, and when to try again."""
        pairs = [(ERROR_KEY, self.error or "EldricError")]
        if self.retry_after_s is not None:
            pairs.append((RETRY_KEY, str(round(self.retry_after_s * 1000))))
        return tuple(pairs)


class Aborted(EldricError):
    """A servicer called context.abort on the REST face."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = code.name


def failure_of(error: BaseException, method: str) -> Failure:
    """What a caller learns of an error. One that nobody raised on purpose becomes INTERNAL with an incident's number;
    its traceback goes to the log and nowhere else."""
    if isinstance(error, grpc.RpcError):
        error = error_from_rpc(error, "another node")
    status = getattr(error, "status", None)
    if isinstance(status, str) and status in grpc.StatusCode.__members__:
        retry = getattr(error, "retry_after_s", None)
        return Failure(grpc.StatusCode[status], _bounded(str(error)), type(error).__name__, retry)
    if isinstance(error, TimeoutError):
        return Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "a part of this call took too long", "DeadlineExceeded")
    incident = secrets.token_hex(4)
    log.error("event=internal_error incident=%s method=%s", incident, method, exc_info=error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _EXHAUSTED:
        lacking = getattr(error, "strerror", None) or "no memory is left"
        message = f"this node lacks a resource: {lacking}; incident {incident} in its log"
        return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, NotEnoughMemory.__name__)
    return Failure(grpc.StatusCode.INTERNAL, f"internal error; incident {incident} in this node's log")


def _bounded(message: str) -> str:
    raw = message.encode(errors="replace")
    return raw[:MAX_MESSAGE_BYTES].decode(errors="ignore") + ("…" if len(raw) > MAX_MESSAGE_BYTES else "")


class CallFailed(Exception):
    """A guarded call failed; `failure` is what its caller learns."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class CallGuard:
    """Authorises, counts and times calls, and turns their errors into CallFailed."""

    def __init__(self, metrics: CallMetrics, expelled: Expelled | None = None) -> None:
        self._metrics = metrics
        self._expelled = expelled or Expelled()
        self._pending = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.asynccontextmanager
    async def call(self, face: str, method: str, caller: Caller | None) -> AsyncIterator[Rule]:
        """Around one call of "/package.Service/Method". Gives the rule that allows it. Raises CallFailed."""
        label = method.rpartition(".")[2]
        with self._metrics.observe(face, label) as codes, self._counted(method):
            try:
                rule = authorise(method, caller)
                with self._expelled.calling(caller):
                    yield rule
            except (asyncio.CancelledError, GeneratorExit):
                codes.append("CANCELLED")
                raise
            except grpc.aio.AbortError:
                codes.append("ABORTED")
                raise
            except Exception as error:
                failure = failure_of(error, method)
                codes.append(failure.code.name)
                raise CallFailed(failure) from error

    @contextlib.contextmanager
    def _counted(self, method: str) -> Any:
        if method.endswith(_ENDLESS):
            yield
            return
        self._pending += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._pending -= 1
            if not self._pending:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when no call is being answered, endless streams apart."""
        await self._idle.wait()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards every call of a grpc.aio server. Servicers are asynchronous: coroutines and asynchronous generators."""

    def __init__(self, guard: CallGuard) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # grpc answers UNIMPLEMENTED
        return self._guarded(str(handler_call_details.method), handler)

    def _guarded(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        inner = getattr(handler, kind)
        behaviour = self._stream(method, inner) if handler.response_streaming else self._unary(method, inner)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: grpc.RpcMethodHandler[Any, Any] = make(
            behaviour, handler.request_deserializer, handler.response_serializer
        )
        return made

    def _unary(self, method: str, inner: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            async with self._answering(method, context) as (rule, caller):
                return await inner(checked_request(rule, caller, request), context)

        return answer

    def _stream(self, method: str, inner: Any) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._answering(method, context) as (rule, caller):
                answers = inner(checked_request(rule, caller, request), context)
                if inspect.isawaitable(answers):  # it writes to the context
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for message in answers:
                        yield message

        return answer

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, context: Any) -> AsyncIterator[tuple[Rule, Caller | None]]:
        try:
            caller = find_caller(context)
            async with self._guard.call("grpc", method, caller) as rule:
                yield rule, caller
        except CallFailed as error:
            failure = error.failure
            await context.abort(failure.code, failure.message, failure.metadata())


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def checked_request(rule: Rule, caller: Caller | None, request: Any) -> Any:
    """The request, or the stream of them. Raises PermissionDenied when one speaks for another node than its caller."""
    if rule.subject is None or caller is None:
        return request
    if hasattr(request, "__aiter__"):
        return _checked_stream(rule, caller, request)
    caller.must_be(rule.subject(request))
    return request


async def _checked_stream(rule: Rule, caller: Caller, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if rule.subject is not None:
            caller.must_be(rule.subject(request))
        yield request
