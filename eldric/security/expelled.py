"""Who is no member any more, though its certificate has not ended."""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from eldric.errors import PermissionDenied
from eldric.security.access import Caller


class Expelled:
    """What one node knows of it: members hear it from the controller. It belongs to the event loop."""

    def __init__(self) -> None:
        self.node_ids: frozenset[str] = frozenset()
        self._calls: dict[str, set[asyncio.Task[object]]] = {}

    def replace(self, node_ids: Iterable[str]) -> None:
        """These are all. Calls of theirs that run end now."""
        self.node_ids = frozenset(node_ids)
        for node_id in self.node_ids & self._calls.keys():
            for task in self._calls[node_id]:
                task.cancel()

    def check(self, caller: Caller | None) -> None:
        """Raises PermissionDenied for a caller that was expelled."""
        if caller is not None and caller.node_id in self.node_ids:
            raise PermissionDenied(f"{caller.node_id} was expelled from this cluster: it may join under another name")

    @contextlib.contextmanager
    def calling(self, caller: Caller | None) -> Iterator[None]:
        """Around a call, which is this task's. Raises PermissionDenied, also in the midst of it."""
        self.check(caller)
        task = asyncio.current_task()
        if caller is None or task is None:
            yield
            return
        calls = self._calls.setdefault(caller.node_id, set())
        calls.add(task)
        try:
            yield
        except asyncio.CancelledError:
            self.check(caller)  # who was expelled hears why
            raise
        finally:
            calls.discard(task)
            if not calls:
                self._calls.pop(caller.node_id, None)
