"""Messages of the contract to the controller's values and back."""

from collections.abc import Callable, Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from eldric.controller.costs import DEFAULT_CHUNK, DEFAULT_CONTEXT, DEFAULT_SLOTS, ModelShape, Options
from eldric.controller.deployments import Deployment, PipelineState, Wanted
from eldric.controller.links import AUTO
from eldric.controller.nodes import (
    Device,
    Endpoint,
    Memory,
    NodeInfo,
    NodeState,
    Resources,
    StageKey,
    StageReport,
    StageState,
)
from eldric.controller.pipelines import PipelineRecord, StageRecord, Verdict
from eldric.controller.planner import Order, Plan
from eldric.controller.registry import Node
from eldric.engine.shard import ModelCosts
from eldric.errors import InvalidRequest
from eldric.v1 import common_pb2, heartbeat_pb2, model_store_pb2, pipeline_pb2, registry_pb2, stage_pb2

FindNode = Callable[[str], Node | None]

#: Largest description of a node: a hundred devices.
MAX_NODE_BYTES = 64 * 1024


def kind_name(kind: "registry_pb2.NodeKind.ValueType") -> str:
    """ "worker" for WORKER. Raises InvalidRequest for a kind that this version does not know."""
    if kind not in registry_pb2.NodeKind.values() or kind == registry_pb2.NODE_KIND_UNSPECIFIED:
        raise InvalidRequest(f"unknown kind of node: {kind}")
    return registry_pb2.NodeKind.Name(kind).lower()


def node_info(message: registry_pb2.Node) -> NodeInfo:
    """Raises InvalidRequest when the parts of the message do not agree, something is missing, or it is out of all
    proportion: everybody who watches the registry gets it."""
    if message.ByteSize() > MAX_NODE_BYTES:
        raise InvalidRequest(
            f"a node that needs {message.ByteSize()} bytes to describe itself, {MAX_NODE_BYTES} may be"
        )
    kind = kind_name(message.kind)
    if message.id != f"{kind}/{message.name}" or not message.name:
        raise InvalidRequest(f"the node's id is {message.id!r}, of kind {kind} and name {message.name!r}")
    if not message.grpc_address or not message.incarnation:
        raise InvalidRequest(f"{message.id} gives no gRPC address or no incarnation")
    resources = None
    if message.HasField("resources"):
        given = message.resources
        resources = Resources(
            cores=given.cores,
            memory_bytes=given.memory_bytes,
            devices=tuple(Device(each.name, each.description, each.memory_bytes) for each in given.devices),
            engine=given.engine,
            cpu_variant=given.cpu_variant,
            transports=tuple(given.transports),
            host=given.host,
            device=given.device,
        )
    return NodeInfo(
        kind=kind,
        name=message.name,
        grpc_address=message.grpc_address,
        http_url=message.http_url,
        version=message.version,
        protocol=message.protocol,
        pid=message.pid,
        incarnation=message.incarnation,
        resources=resources,
        edge_id=message.edge_id,
        join_address=message.join_address,
    )


def node_message(node: Node) -> registry_pb2.Node:
    info = node.info
    message = registry_pb2.Node(
        id=info.id,
        name=info.name,
        kind=registry_pb2.NodeKind.Value(info.kind.upper()),
        state=_NODE_STATES[node.state],
        grpc_address=info.grpc_address,
        http_url=info.http_url,
        version=info.version,
        protocol=info.protocol,
        pid=info.pid,
        incarnation=info.incarnation,
        registered_at=_timestamp(node.registered_at),
        memory_used_bytes=node.memory_used_bytes,
        edge_id=info.edge_id,
        join_address=info.join_address,
    )
    if (given := info.resources) is not None:
        message.resources.CopyFrom(
            registry_pb2.Resources(
                cores=given.cores,
                memory_bytes=given.memory_bytes,
                devices=[
                    registry_pb2.Device(name=each.name, description=each.description, memory_bytes=each.memory_bytes)
                    for each in given.devices
                ],
                engine=given.engine,
                cpu_variant=given.cpu_variant,
                transports=given.transports,
                host=given.host,
                device=given.device,
            )
        )
    return message


def stage_report(status: stage_pb2.StageStatus) -> StageReport:
    return StageReport(
        key=StageKey(status.pipeline_id, status.epoch, status.index),
        state=_STAGE_STATES.get(status.state, StageState.LOADING),
        message=status.message,
        memory=_memory(status.memory),
        step_ms=status.step_ms,
        steps=status.steps,
        slots_used=status.slots_used,
        queued=status.queued,
        endpoint=_endpoint(status.endpoint),
        round=status.round,
        sender_scheme=status.sender_scheme,
        sender_key=status.sender_key,
        link=status.link if status.HasField("link") else None,
    )


def loaded_report(key: StageKey, loaded: stage_pb2.Loaded) -> StageReport:
    return StageReport(key, StageState.LOADED, memory=_memory(loaded.memory), endpoint=_endpoint(loaded.endpoint))


def endpoint_message(endpoint: Endpoint) -> common_pb2.TensorEndpoint:
    return common_pb2.TensorEndpoint(scheme=endpoint.scheme, address=endpoint.address, public_key=endpoint.public_key)


def wanted_message(wanted: Wanted) -> heartbeat_pb2.WantedStage:
    key = wanted.key
    return heartbeat_pb2.WantedStage(
        pipeline_id=key.pipeline_id,
        index=key.index,
        epoch=key.epoch,
        degraded=wanted.degraded,
        closing=wanted.closing,
        reason=wanted.reason,
    )


def model_shape(metadata: model_store_pb2.ModelMetadata) -> ModelShape:
    """Raises InvalidRequest for a model that cannot be deployed."""
    info, costs = metadata.info, metadata.costs
    if info.problem:
        raise InvalidRequest(f"{info.id} cannot be deployed: {info.problem}")
    if not costs.layer_bytes or not costs.kv_bytes_per_cell_per_layer:
        raise InvalidRequest(f"{info.id} cannot be deployed: the model store does not say what its layers weigh")
    return ModelShape(
        name=info.id,
        costs=ModelCosts(
            layer_bytes=tuple(costs.layer_bytes),
            head_bytes=costs.head_bytes,
            tail_bytes=costs.tail_bytes,
            shared_bytes=costs.shared_bytes,
            every_bytes=costs.every_bytes,
            kv_bytes_per_cell_per_layer=costs.kv_bytes_per_cell_per_layer,
            row_bytes=costs.row_bytes,
            logits_row_bytes=costs.logits_row_bytes,
        ),
        context=info.context,
    )


def order_of(request: pipeline_pb2.DeployRequest, shape: ModelShape) -> Order:
    """What a request asks for, defaults filled in. Raises InvalidRequest."""
    given = request.options
    options = Options(
        context=given.context or min(shape.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        slots=given.slots or DEFAULT_SLOTS,
        chunk=given.chunk or DEFAULT_CHUNK,
        lanes=given.lanes,
        threads=given.threads,
        exact=given.exact if given.HasField("exact") else None,
        weights=given.weights or "auto",
        trace=given.trace,
        kv_type=given.kv_type or "f16",
    )
    return Order(options, request.stages, tuple(request.workers), tuple(request.layers), wish_of(request))


def wish_of(request: pipeline_pb2.DeployRequest) -> str:
    """The one transport that a request asks for; empty: whichever is best for each link."""
    return "" if request.transport == AUTO else request.transport


def options_message(options: Options) -> common_pb2.StageOptions:
    return common_pb2.StageOptions(
        context=options.context,
        slots=options.slots,
        chunk=options.chunk,
        lanes=options.lanes,
        threads=options.threads,
        exact=options.exact,
        weights=options.weights,
        trace=options.trace,
        kv_type=options.kv_type,
    )


def plan_message(plan: Plan, model: str) -> pipeline_pb2.DeploymentPlan:
    return pipeline_pb2.DeploymentPlan(
        model=model,
        stages=[
            pipeline_pb2.PlannedStage(
                index=stage.index,
                worker=stage.worker,
                layers=common_pb2.LayerRange(start=stage.start, end=stage.end),
                weights_bytes=stage.weights_bytes,
                kv_bytes=stage.kv_bytes,
                compute_bytes=stage.compute_bytes,
                available_bytes=stage.available_bytes,
                transports=stage.transports,
            )
            for stage in plan.stages
        ],
        excluded=[pipeline_pb2.ExcludedWorker(worker=worker, reason=reason) for worker, reason in plan.excluded],
        options=options_message(plan.options),
    )


def load_request(
    record: PipelineRecord, stage: StageRecord, key: StageKey, stage_count: int, transport: str, far: bool
) -> stage_pb2.LoadRequest:
    return stage_pb2.LoadRequest(
        pipeline_id=record.id,
        name=record.name,
        epoch=key.epoch,
        index=stage.index,
        stage_count=stage_count,
        layers=common_pb2.LayerRange(start=stage.start, end=stage.end),
        source=record.source,
        options=record.options,
        memory_limit_bytes=stage.limit_bytes,
        transport=transport,
        insecure_tensors=record.request.insecure_tensors,
        far=far,
    )


def pipeline_info(deployment: Deployment, find: FindNode) -> pipeline_pb2.PipelineInfo:
    """All that is known of a pipeline now."""
    record = deployment.record
    info = bare_info(record)
    info.state = _PIPELINE_STATES[deployment.state]
    info.message, info.progress = deployment.message, deployment.progress
    for stage, verdict in zip(record.stages, deployment.verdicts, strict=True):
        info.stages.append(_pipeline_stage(record, stage, verdict, find(stage.node_id)))
    if record.stages:
        head = record.stages[0]
        node = find(head.node_id)
        info.head_node = head.node_id
        info.head_address = node.info.grpc_address if node is not None else ""
        report = _report(record, head, node)
        info.slots_used, info.queued = (report.slots_used, report.queued) if report else (0, 0)
    return info


def bare_info(record: PipelineRecord) -> pipeline_pb2.PipelineInfo:
    """What is kept of a pipeline, without how it is now."""
    return pipeline_pb2.PipelineInfo(
        id=record.id,
        name=record.name,
        model=record.model,
        epoch=record.epoch,
        options=record.options,
        created_at=_timestamp(record.created_at),
        source=record.source,
    )


def summary(deployment: Deployment) -> pipeline_pb2.PipelineSummary:
    record = deployment.record
    return pipeline_pb2.PipelineSummary(name=record.name, model=record.model, state=_PIPELINE_STATES[deployment.state])


def reports(statuses: Iterable[stage_pb2.StageStatus]) -> list[StageReport]:
    return [stage_report(status) for status in statuses]


def _pipeline_stage(
    record: PipelineRecord, stage: StageRecord, verdict: Verdict, node: Node | None
) -> pipeline_pb2.PipelineStage:
    message = pipeline_pb2.PipelineStage(
        index=stage.index,
        worker=stage.worker,
        layers=common_pb2.LayerRange(start=stage.start, end=stage.end),
        message=verdict.why,
        transport=record.transport,
        encrypted=not record.request.insecure_tensors,
    )
    report = _report(record, stage, node)
    if report is None or node is None:
        return message
    message.pid = node.info.pid
    message.state = _STAGE_VALUES[report.state]
    message.step_ms, message.steps = report.step_ms, report.steps
    message.message = verdict.why or report.message
    use = report.memory
    message.memory.CopyFrom(
        common_pb2.MemoryUse(
            mapped_bytes=use.mapped, repacked_bytes=use.repacked, kv_bytes=use.kv, compute_bytes=use.compute
        )
    )
    if report.endpoint is not None:
        message.transport, message.encrypted = report.endpoint.scheme, bool(report.endpoint.public_key)
    if report.link is not None:
        message.link.CopyFrom(report.link)
    return message


def _report(record: PipelineRecord, stage: StageRecord, node: Node | None) -> StageReport | None:
    if node is None or node.info.incarnation != stage.incarnation or not node.is_alive:
        return None
    return node.stages.get(record.key(stage))


def _memory(use: common_pb2.MemoryUse) -> Memory:
    return Memory(use.mapped_bytes, use.repacked_bytes, use.kv_bytes, use.compute_bytes)


def _endpoint(endpoint: common_pb2.TensorEndpoint) -> Endpoint | None:
    return Endpoint(endpoint.scheme, endpoint.address, endpoint.public_key) if endpoint.address else None


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


_NODE_STATES = {state: registry_pb2.NodeState.Value(state.name) for state in NodeState}
_PIPELINE_STATES = {state: pipeline_pb2.PipelineState.Value(state.name) for state in PipelineState}
_STAGE_VALUES = {state: stage_pb2.StageState.Value(state.name) for state in StageState}
_STAGE_STATES = {value: state for state, value in _STAGE_VALUES.items()}
