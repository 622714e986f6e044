"""Finds a model in the stores of the registered data workers, and which of them hold the very same files."""

import asyncio
import logging

from eldric.channels import ChannelPool, call_errors
from eldric.controller.cluster import Cluster
from eldric.controller.config import ControllerConfig
from eldric.controller.nodes import NodeState
from eldric.controller.registry import Node
from eldric.errors import EldricError, NotFound, NotReady
from eldric.nearest import known_names
from eldric.replicas import is_same
from eldric.v1 import model_store_pb2, model_store_pb2_grpc, stage_pb2

log = logging.getLogger(__name__)

#: Once one data worker has answered, how long the others are waited for, in seconds.
REPLICAS_S = 1.0

Answers = list[tuple[Node, model_store_pb2.ModelMetadata | EldricError]]


class Models:
    """The model store as the controller sees it: all data workers together. One that is down is passed over."""

    def __init__(self, config: ControllerConfig, cluster: Cluster, channels: ChannelPool) -> None:
        self._config = config
        self._cluster = cluster
        self._channels = channels

    async def find(self, model: str) -> model_store_pb2.ModelMetadata:
        """What the first data worker that has it says of a model; its source names all that hold the same files.

        Raises NotReady without a data worker, NotFound with what to do, or what kept a data worker from
        answering.
        """
        nodes = self._nodes()
        if not nodes:
            raise NotReady("there is no data worker, so no model store: start one with `eldric-cli data`")
        answers = await self._ask_all(nodes, model)
        for _, answer in answers:
            if isinstance(answer, model_store_pb2.ModelMetadata):
                answer.source.CopyFrom(_located(answer.source, answers))
                return answer
        for _, answer in answers:
            if isinstance(answer, EldricError) and not isinstance(answer, NotFound):
                raise answer
        raise NotFound(
            f"there is no model {model!r} in the store; {known_names(model, await self._names(nodes))}; "
            f"add it with `eldric-cli models add FILE --name {model}`"
        )

    async def others(self, model: str, node_id: str) -> list[model_store_pb2.ModelMetadata]:
        """What the data workers besides this one say of a model, as far as they have it."""
        answers = await self._ask_all([node for node in self._nodes() if node.id != node_id], model)
        return [answer for _, answer in answers if isinstance(answer, model_store_pb2.ModelMetadata)]

    async def located(self, source: stage_pb2.ModelSource) -> stage_pb2.ModelSource:
        """A kept source with the places that hold its files now; as it was where nobody says. Never raises."""
        made = _located(source, await self._ask_all(self._nodes(), source.model))
        return made if made.places else source

    def _nodes(self) -> list[Node]:
        alive = (NodeState.UP, NodeState.DRAINING)
        return [node for node in self._cluster.nodes("data") if node.state in alive]

    async def _ask_all(self, nodes: list[Node], model: str) -> Answers:
        """What each says, in their order; of those that answer much later than the first, nothing."""
        asking = [asyncio.create_task(self._ask(node, model)) for node in nodes]
        left: set[asyncio.Task[model_store_pb2.ModelMetadata | EldricError]] = set(asking)
        try:
            while left and not any(_has_it(task) for task in asking):
                _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            if left:
                await asyncio.wait(left, timeout=REPLICAS_S)
            return [(node, task.result()) for node, task in zip(nodes, asking, strict=True) if task.done()]
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask(self, node: Node, model: str) -> model_store_pb2.ModelMetadata | EldricError:
        try:
            with call_errors(node.id):
                request = model_store_pb2.ModelRequest(id=model)
                return await self._stub(node).Metadata(request, timeout=self._config.call_s)
        except EldricError as error:
            return error

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


def _has_it(task: "asyncio.Task[model_store_pb2.ModelMetadata | EldricError]") -> bool:
    return task.done() and isinstance(task.result(), model_store_pb2.ModelMetadata)


def _located(source: stage_pb2.ModelSource, answers: Answers) -> stage_pb2.ModelSource:
    """The source with the data workers that hold these very files, and where their folders can be mounted from."""
    made = stage_pb2.ModelSource()
    made.CopyFrom(source)
    made.ClearField("places")
    made.ClearField("exports")
    for node, answer in answers:
        if not isinstance(answer, model_store_pb2.ModelMetadata):
            continue
        if is_same(source, answer.source):
            made.places.append(stage_pb2.ModelPlace(node_id=node.id, http_url=node.info.http_url))
            made.exports.extend(answer.source.exports)
        else:
            log.warning(
                "event=other_model source=%s model=%s: its files differ from the planned", node.id, source.model
            )
    return made
