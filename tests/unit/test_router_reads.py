"""Reads of a head's answers, whose waiters may be cancelled."""

import asyncio

import pytest

from eldric.router.generation import read


class Call:
    """Reads a message when there is one, and fails when it is cancelled, as grpc.aio's does."""

    def __init__(self) -> None:
        self.message: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def read(self) -> str:
        return await self.message

    def cancel(self) -> None:
        self.message.set_exception(RuntimeError("the call was cancelled"))


async def test_a_message_is_read() -> None:
    call = Call()
    call.message.set_result("hello")
    assert await read(call) == "hello"


async def test_a_failure_is_the_readers() -> None:
    call = Call()
    call.message.set_exception(ValueError("lost"))
    with pytest.raises(ValueError, match="lost"):
        await read(call)


async def test_who_is_cancelled_cancels_the_call_and_never_its_read() -> None:
    call = Call()
    waiter = asyncio.create_task(read(call))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert isinstance(call.message.exception(), RuntimeError), "not cancelled: ended with its call"
    assert asyncio.all_tasks() == {asyncio.current_task()}
