"""Models that are about to be removed: the controller says whether a pipeline needs them."""

import contextlib
from collections.abc import Callable, Iterator

from eldric.channels import call_errors
from eldric.errors import NotReady, Unavailable
from eldric.node import Node
from eldric.v1 import replication_pb2, replication_pb2_grpc

#: Longest wait for the controller, which may ask other data workers, in seconds.
_TIMEOUT_S = 15.0


class Leaving:
    def __init__(self, node: Node, controller: Callable[[], str]) -> None:
        """`controller` says the address of the one that the node is a member of."""
        self._node, self._controller = node, controller
        self._models: set[str] = set()

    def check(self, model: str) -> None:
        """Planning must not count on it. Raises NotReady."""
        if model in self._models:
            raise NotReady(f"the model {model!r} is being removed")

    @contextlib.contextmanager
    def hidden(self, model: str) -> Iterator[None]:
        """While it is found out whether it may go, and until it is gone. Raises NotReady when somebody else removes
        it."""
        self.check(model)
        self._models.add(model)
        try:
            yield
        finally:
            self._models.discard(model)

    async def ask(self, model: str) -> None:
        """Raises NotReady when a pipeline needs it, Unavailable when nobody says whether one does."""
        controller = self._controller()
        request = replication_pb2.ReleaseRequest(model=model, node_id=self._node.config.node_id)
        try:
            with call_errors(f"controller at {controller}"):
                stub = replication_pb2_grpc.ReplicationStub(self._node.channels.to(controller, "controller"))
                await stub.Release(request, timeout=_TIMEOUT_S)
        except Unavailable as error:
            raise Unavailable(f"nobody says whether a pipeline needs {model}: {error.message}") from None
