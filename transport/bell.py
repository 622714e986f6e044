"""Wakes a thread that waits in poll. Linux only."""

import os
import threading


class Bell:
    """`ring` may be called from any thread and never blocks; all else by the thread that waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # or a ring might reach whoever has the descriptor next
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """For polling; -1 once it is closed."""
        return self._descriptor

    def ring(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def hear(self) -> None:
        """It was rung, however often."""
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:  # it was heard before
            return

    def close(self) -> None:
        """Idempotent; `ring` does nothing from then on."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
