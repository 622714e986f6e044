"""Finds a model in the stores of the registered data workers."""

import asyncio

from eldric.channels import ChannelPool, call_errors
from eldric.controller.cluster import Cluster
from eldric.controller.config import ControllerConfig
from eldric.controller.nodes import NodeState
from eldric.controller.registry import Node
from eldric.errors import EldricError, NotFound, NotReady
from eldric.v1 import model_store_pb2, model_store_pb2_grpc

#: Names of other models that an error lists.
MAX_NAMES = 20


class Models:
    """The model store as the controller sees it."""

    def __init__(self, config: ControllerConfig, cluster: Cluster, channels: ChannelPool) -> None:
        self._config = config
        self._cluster = cluster
        self._channels = channels

    async def find(self, model: str) -> model_store_pb2.ModelMetadata:
        """What the first data worker that has it says of a model.

        Raises NotReady without a data worker, NotFound with what to do, or what kept a data worker from
        answering.
        """
        nodes = [node for node in self._cluster.nodes("data") if node.state in (NodeState.UP, NodeState.DRAINING)]
        if not nodes:
            raise NotReady("there is no data worker, so no model store: start one with `eldric-cli data`")
        answers = await asyncio.gather(*(self._ask(node, model) for node in nodes), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, model_store_pb2.ModelMetadata):
                return answer
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, NotFound):
                raise answer
        names = await self._names(nodes)
        listed = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        raise NotFound(
            f"there is no model {model!r} in the store, which has: {listed or 'none'}; "
            f"add it with `eldric-cli models add FILE --name {model}`"
        )

    async def _ask(self, node: Node, model: str) -> model_store_pb2.ModelMetadata:
        with call_errors(node.id):
            request = model_store_pb2.ModelRequest(id=model)
            return await self._stub(node).Metadata(request, timeout=self._config.call_s)

    async def _names(self, nodes: list[Node]) -> list[str]:
        names: set[str] = set()
        for node in nodes:
            try:
                with call_errors(node.id):
                    request = model_store_pb2.ListModelsRequest()
                    answer = await self._stub(node).List(request, timeout=self._config.call_s)
            except EldricError:
                continue  # the names are only a help
            names.update(info.id for info in answer.models)
        return sorted(names)

    def _stub(self, node: Node) -> "model_store_pb2_grpc.ModelStoreAsyncStub":
        info = node.info
        return model_store_pb2_grpc.ModelStoreStub(self._channels.to(info.grpc_address, info.kind, info.name))
