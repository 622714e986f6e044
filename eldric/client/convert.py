"""Messages to the client's types."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from eldric.client import types
from eldric.errors import InvalidRequest
from eldric.v1 import common_pb2, inference_pb2, model_store_pb2, pipeline_pb2, registry_pb2, replication_pb2, stage_pb2

_FINISH: dict[int, types.Finish] = {
    inference_pb2.STOP: "stop",
    inference_pb2.LENGTH: "length",
    inference_pb2.CANCELLED: "cancelled",
}

#: What a field's value must be, for people.
_WANTED = {
    FieldDescriptor.CPPTYPE_UINT32: f"a whole number from 0 to {2**32 - 1}",
    FieldDescriptor.CPPTYPE_UINT64: f"a whole number from 0 to {2**64 - 1}",
    FieldDescriptor.CPPTYPE_INT32: f"a whole number from {-(2**31)} to {2**31 - 1}",
    FieldDescriptor.CPPTYPE_INT64: f"a whole number from {-(2**63)} to {2**63 - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a text",
}


def _name(enum: Any, value: int) -> str:
    """An enum's value in lower case; "unknown" for none, and for one of a newer controller."""
    try:
        name = str(enum.Name(value)).lower()
    except ValueError:
        return "unknown"
    return "unknown" if name.endswith("_unspecified") else name


def worker(node: registry_pb2.Node) -> types.Worker:
    resources = node.resources
    return types.Worker(
        name=node.name,
        pid=node.pid,
        state=_name(registry_pb2.NodeState, node.state),
        device=resources.device,
        devices=tuple(f"{device.name} ({device.description})" for device in resources.devices),
        memory_bytes=resources.memory_bytes,
        memory_used_bytes=node.memory_used_bytes,
        cores=resources.cores,
        engine=f"{resources.engine} {resources.cpu_variant}".strip(),
        address=node.grpc_address,
    )


def node_info(node: registry_pb2.Node) -> types.NodeInfo:
    return types.NodeInfo(
        name=node.name,
        kind=_name(registry_pb2.NodeKind, node.kind),
        state=_name(registry_pb2.NodeState, node.state),
        pid=node.pid,
        grpc_address=node.grpc_address,
        http_url=node.http_url,
        version=node.version,
        protocol=node.protocol,
    )


def _memory(memory: common_pb2.MemoryUse) -> dict[str, int]:
    return {
        "mapped": memory.mapped_bytes,
        "repacked": memory.repacked_bytes,
        "kv": memory.kv_bytes,
        "compute": memory.compute_bytes,
    }


def _stage(stage: pipeline_pb2.PipelineStage) -> types.StageInfo:
    memory = _memory(stage.memory)
    return types.StageInfo(
        index=stage.index,
        worker=stage.worker,
        pid=stage.pid,
        layers=(stage.layers.start, stage.layers.end),
        state=_name(stage_pb2.StageState, stage.state),
        memory_bytes=sum(memory.values()),
        memory=memory,
        step_ms=round(stage.step_ms, 3),
        steps=stage.steps,
        transport=stage.transport,
        encrypted=stage.encrypted,
        message=stage.message,
        link=_link(stage.link) if stage.HasField("link") else None,
    )


def _link(link: stage_pb2.LinkStatus) -> types.LinkInfo:
    return types.LinkInfo(
        to_stage=link.to_stage,
        transport=link.transport,
        encryption=link.encryption,
        round_trip_ms=round(link.round_trip_ms, 3),
        frames=link.frames,
        bytes=link.bytes,
        queue_frames=link.queue_frames,
        queue_bytes=link.queue_bytes,
        fallback=link.fallback,
        closed=link.closed,
    )


def _options(options: common_pb2.StageOptions) -> dict[str, int | str | bool]:
    return {field.name: value for field, value in options.ListFields()}


def pipeline(info: pipeline_pb2.PipelineInfo) -> types.PipelineInfo:
    return types.PipelineInfo(
        name=info.name,
        id=info.id,
        model=info.model,
        state=_name(pipeline_pb2.PipelineState, info.state),
        epoch=info.epoch,
        stages=tuple(_stage(stage) for stage in info.stages),
        context=info.options.context,
        slots=info.options.slots,
        slots_used=info.slots_used,
        queued=info.queued,
        progress=info.progress,
        message=info.message,
        options=_options(info.options),
    )


def plan(message: pipeline_pb2.DeploymentPlan) -> types.Plan:
    stages = tuple(
        types.PlannedStage(
            index=stage.index,
            worker=stage.worker,
            layers=(stage.layers.start, stage.layers.end),
            weights_bytes=stage.weights_bytes,
            kv_bytes=stage.kv_bytes,
            compute_bytes=stage.compute_bytes,
            available_bytes=stage.available_bytes,
            transports=tuple(stage.transports),
        )
        for stage in message.stages
    )
    return types.Plan(message.model, stages, {each.worker: each.reason for each in message.excluded})


def deploy_event(event: pipeline_pb2.DeployEvent) -> types.DeployEvent | None:
    """None for an event of a newer controller that this client does not know."""
    match event.WhichOneof("event"):
        case "plan":
            return plan(event.plan)
        case "stage":
            stage = event.stage
            return types.StageProgress(stage.index, stage.worker, stage.phase, stage.done_bytes, stage.total_bytes)
        case "ready":
            return pipeline(event.ready)
    return None


def model(info: model_store_pb2.ModelInfo) -> types.ModelInfo:
    return types.ModelInfo(
        name=info.id,
        layers=info.layers,
        size_bytes=info.size_bytes,
        format=info.format,
        architecture=info.architecture,
        quantization=info.quantization,
        parameters=info.parameters,
        context=info.context,
        problem=info.problem,
    )


def import_event(event: model_store_pb2.ImportEvent) -> types.PullEvent:
    if event.HasField("model"):
        return model(event.model)
    if event.HasField("resolved"):
        resolved = event.resolved
        return types.ResolvedSource(
            source=resolved.source,
            name=resolved.id,
            quantization=resolved.quantization,
            files=tuple((file.name, file.size_bytes) for file in resolved.files),
            size_bytes=sum(file.size_bytes for file in resolved.files),
            kept_bytes=resolved.kept_bytes,
            problem=resolved.problem,
        )
    return types.ImportProgress(event.phase, event.done_bytes, event.total_bytes)


def with_copies(info: types.ModelInfo, copies: int, wanted: replication_pb2.ModelReplication) -> types.ModelInfo:
    return dataclasses.replace(info, copies=copies, copies_wanted=wanted.copies)


def replication(wanted: replication_pb2.ModelReplication) -> str:
    """What is done about copies that are missing, in words; "" where there are enough."""
    parts = []
    for copy in wanted.copying:
        share = f" ({100 * copy.done_bytes // copy.total_bytes} %)" if copy.total_bytes else ""
        parts.append(f"{copy.data_worker} copies it from {copy.from_data_worker}{share}")
    if wanted.problem:
        parts.append(wanted.problem)
    if wanted.waits_ms:
        parts.append(f"another copy is made in {-(-wanted.waits_ms // 1000)} s")
    return "; ".join(parts)


def model_details(
    metadata: model_store_pb2.ModelMetadata,
    data_workers: tuple[str, ...],
    wanted: replication_pb2.ModelReplication,
) -> types.ModelDetails:
    return types.ModelDetails(
        info=with_copies(model(metadata.info), len(data_workers), wanted),
        hidden_size=metadata.hidden_size,
        heads=metadata.heads,
        kv_heads=metadata.kv_heads,
        vocab_size=metadata.vocab_size,
        tensor_count=metadata.tensor_count,
        folder=metadata.source.folder,
        files=tuple((file.path, file.size_bytes) for file in metadata.source.files),
        sha256=tuple(metadata.sha256),
        header=dict(metadata.header),
        origin=metadata.origin,
        data_workers=data_workers,
        replication=replication(wanted),
    )


def event(message: inference_pb2.GenerateEvent) -> types.Event | None:
    """None for an event of a newer router that this client does not know."""
    match message.WhichOneof("event"):
        case "started":
            return types.Started(message.started.request_id, message.started.prompt_tokens)
        case "delta":
            return types.Delta(message.delta.text, tuple(_token(token) for token in message.delta.tokens))
        case "finished":
            finished = message.finished
            return types.Finished(
                reason=_FINISH.get(finished.reason, "stop"),
                prompt_tokens=finished.usage.prompt_tokens,
                completion_tokens=finished.usage.completion_tokens,
                queue_ms=finished.timings.queue_ms,
                prompt_ms=finished.timings.prompt_ms,
                generation_ms=finished.timings.generation_ms,
                stop=finished.stop,
                cached_tokens=finished.usage.cached_tokens,
            )
    return None


def _token(token: inference_pb2.GeneratedToken) -> types.Token:
    if not token.HasField("logprob"):
        return types.Token(token.id, token.text)
    return types.Token(token.id, token.text, token.logprob, tuple((top.token, top.logprob) for top in token.top))


def deploy_request(model: str, options: Mapping[str, Any]) -> pipeline_pb2.DeployRequest:
    """Options that are no fields of DeployRequest are those of its stages. Raises InvalidRequest for a wrong one."""
    fields = {field.name for field in pipeline_pb2.DeployRequest.DESCRIPTOR.fields} - {"options", "model"}
    request = pipeline_pb2.DeployRequest(model=model)
    _fill(request, {name: value for name, value in options.items() if name in fields})
    _fill(request.options, {name: value for name, value in options.items() if name not in fields})
    return request


def generate_request(
    model: str,
    max_tokens: int,
    stop: str | Sequence[str],
    ignore_eos: bool,
    cache_prompt: bool,
    sampling: Mapping[str, Any],
) -> inference_pb2.GenerateRequest:
    """Without the input. Raises InvalidRequest for a wrong option."""
    request = inference_pb2.GenerateRequest(model=model)
    texts = [stop] if isinstance(stop, str) else stop
    _fill(request, {"max_tokens": max_tokens, "stop": texts, "ignore_eos": ignore_eos})
    request.ignore_cache = not cache_prompt
    _fill(request.sampling, sampling)
    return request


def _fill(message: Message, values: Mapping[str, Any]) -> None:
    """Set fields; None leaves one out. Raises InvalidRequest that names the one that is wrong."""
    for name, value in values.items():
        if value is not None:
            try:
                message.MergeFrom(type(message)(**{name: value}))
            except (TypeError, ValueError) as error:
                raise InvalidRequest(_complaint(message, name, value)) from error


def _complaint(message: Message, name: str, value: Any) -> str:
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        return f"there is no option {name!r}"
    wanted = _WANTED.get(field.cpp_type, "of another kind")
    return f"{name} cannot be {value!r}: it must be {'a list, each ' * field.is_repeated}{wanted}"


def token_ids(ids: Sequence[int]) -> inference_pb2.TokenIds:
    """Raises InvalidRequest."""
    try:
        return inference_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a prompt is a text or a list of token ids: {error}") from error


def chat_messages(messages: Sequence[Mapping[str, str]]) -> inference_pb2.ChatMessages:
    """Raises InvalidRequest."""
    try:
        converted = [inference_pb2.ChatMessage(role=each["role"], content=each["content"]) for each in messages]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f'a message is {{"role": ..., "content": ...}}, both text: {error!r}') from error
    return inference_pb2.ChatMessages(messages=converted)
