"""A process that may have no more threads: libraries would end it, so they are not asked for any."""

import threading

import psutil
import pytest

from eldric.transport.errors import UnknownTransport
from tests.transports import make_transport


@pytest.mark.parametrize("scheme", ["zmq", "shm"])
def test_no_transport_is_made_without_threads_for_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with make_transport(scheme, 0):
        pass  # what is made once for the process
    before = psutil.Process().num_fds()
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(UnknownTransport, match=r"can't start new thread: raise the limit \(ulimit -u"):
        make_transport(scheme, 0)
    assert psutil.Process().num_fds() == before
