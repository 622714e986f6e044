"""Whether this process may have more threads. Libraries in C end the whole process when they can get none."""

import threading

from eldric.transport.errors import UnknownTransport


def require_threads(count: int) -> None:
    """Raises UnknownTransport unless that many can be started now."""
    started: list[threading.Thread] = []
    ending = threading.Event()
    try:
        for _ in range(count):
            thread = threading.Thread(target=ending.wait, name="eldric-probe", daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise UnknownTransport(f"{error}: raise the limit (ulimit -u, TasksMax=, pids.max)") from error
    finally:
        ending.set()
        for thread in started:
            thread.join()
