"""From a request to a plan: looks the model up, asks the planner, and makes records of what it says."""

import re
import time
from dataclasses import dataclass, replace

from eldric import PROTOCOL
from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.costs import ModelShape
from eldric.controller.models import Models
from eldric.controller.pacing import Measured, paces
from eldric.controller.partition import Partition
from eldric.controller.pipelines import Phase, PipelineRecord, StageRecord
from eldric.controller.planner import Order, Plan, plan
from eldric.errors import InvalidRequest
from eldric.v1 import pipeline_pb2, stage_pb2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was checked, and the model that it names."""

    request: pipeline_pb2.DeployRequest
    name: str
    shape: ModelShape
    order: Order
    source: stage_pb2.ModelSource


def pipeline_name(request: pipeline_pb2.DeployRequest) -> str:
    """The name that a request's pipeline gets. Raises InvalidRequest."""
    if not request.model:
        raise InvalidRequest("the request names no model")
    name = request.name or request.model
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:200]!r} is no name for a pipeline: use letters, digits, '-', '_', '.' and ':', "
            "a letter or digit first, at most 128 characters"
        )
    return name


class Planning:
    """Plans over the cluster as it is at the moment of the call."""

    def __init__(self, cluster: Cluster, models: Models) -> None:
        self._cluster = cluster
        self._models = models

    async def prepare(self, request: pipeline_pb2.DeployRequest) -> Prepared:
        """Raises InvalidRequest, and what looking the model up raises."""
        name = pipeline_name(request)
        metadata = await self._models.find(request.model)
        shape = convert.model_shape(metadata)
        return Prepared(request, name, shape, convert.order_of(request, shape), metadata.source)

    async def located(self, source: stage_pb2.ModelSource) -> stage_pb2.ModelSource:
        """The source with the data workers that hold it now. Never raises."""
        return await self._models.located(source)

    def plan(self, prepared: Prepared) -> Plan:
        """Raises what the planner raises."""
        return plan(self._cluster.worker_views(), prepared.shape, prepared.order, PROTOCOL)

    def plan_again(self, prepared: Prepared, record: PipelineRecord) -> Plan:
        """As if that pipeline took no memory, and by how fast its stages have been. Raises what the planner raises."""
        views = self._cluster.worker_views(without=record.id)
        partition = Partition(prepared.shape, prepared.order.options)
        measured = []
        for stage in record.stages:
            node = self._cluster.registry.get(stage.node_id)
            report = node.stages.get(record.key(stage)) if node is not None else None
            if report is not None:
                read = partition.read(stage.start, stage.end)
                measured.append(Measured(stage.worker, read, report.step_ms, report.steps))
        known = paces(measured, [view.name for view in views])
        return plan(
            [replace(view, pace=known.get(view.name, 1)) for view in views], prepared.shape, prepared.order, PROTOCOL
        )

    def stages(self, made: Plan) -> tuple[StageRecord, ...]:
        """The stages of a plan, each on the process that its worker is now."""
        return tuple(
            self.renewed(
                StageRecord(
                    index=stage.index,
                    worker=stage.worker,
                    incarnation=0,
                    start=stage.start,
                    end=stage.end,
                    weights_bytes=stage.weights_bytes,
                    kv_bytes=stage.kv_bytes,
                    compute_bytes=stage.compute_bytes,
                    limit_bytes=stage.limit_bytes,
                )
            )
            for stage in made.stages
        )

    def renewed(self, stage: StageRecord) -> StageRecord:
        """The stage on the process that its worker is now."""
        node = self._cluster.registry.get(stage.node_id)
        return replace(stage, incarnation=node.info.incarnation if node is not None else 0)

    def record(self, pipeline_id: str, prepared: Prepared, made: Plan) -> PipelineRecord:
        return PipelineRecord(
            id=pipeline_id,
            name=prepared.name,
            model=prepared.request.model,
            phase=Phase.DEPLOYING,
            epoch=1,
            stages=self.stages(made),
            created_at=time.time(),
            request=prepared.request,
            options=convert.options_message(made.options),
            source=prepared.source,
            transport=made.transport,
        )
