"""The sync client's calls end, whenever an interrupt comes."""

import asyncio
import datetime
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from eldric.client import Client, Cluster
from eldric.security import Authority


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a cluster that is not there."""
    Authority.create("test").issue_identity("client", "me", datetime.timedelta(days=1)).save(tmp_path)
    with Client(Cluster(("127.0.0.1:1",), tmp_path)) as made:
        yield made


class Ticks:
    """An endless stream that knows whether it was begun and closed."""

    def __init__(self) -> None:
        self.begun, self.closed = False, threading.Event()

    async def stream(self) -> AsyncIterator[int]:
        self.begun = True
        try:
            for number in range(10**9):
                await asyncio.sleep(0.0001)
                yield number
        finally:
            self.closed.set()


def test_a_stream_that_is_interrupted_is_closed(client: Client) -> None:
    for attempt in range(100):
        ticks = Ticks()
        moment = time.monotonic() + 0.0005 + attempt * 0.00003

        def interrupt(moment: float = moment) -> None:
            time.sleep(max(0.0, moment - time.monotonic()))
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            for _ in client._iterate(ticks.stream()):
                pass
        thread.join()
        assert not ticks.begun or ticks.closed.wait(5)


def test_a_stream_that_is_left_is_closed(client: Client) -> None:
    ticks = Ticks()
    stream = client._iterate(ticks.stream())
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert ticks.closed.is_set()


def test_closing_the_client_closes_streams(client: Client) -> None:
    ticks = Ticks()
    stream = client._iterate(ticks.stream())
    next(stream)
    client.close()
    assert ticks.closed.is_set()
    client.close()
