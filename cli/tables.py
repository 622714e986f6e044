"""Pipelines, workers and nodes as tables for people."""

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eldric.cli.output import human_bytes, table
from eldric.cli.progress import layer_range
from eldric.client import NodeInfo, PipelineInfo, StageInfo, Worker

_STATE_STYLES = {
    "ready": "green",
    "up": "green",
    "serving": "green",
    "deploying": "yellow",
    "loading": "yellow",
    "loaded": "yellow",
    "draining": "yellow",
    "undeploying": "yellow",
    "unloading": "yellow",
    "suspect": "yellow",
    "degraded": "red",
    "broken": "red",
    "lost": "red",
}


#: What protects a link's frames, where its own word says too little.
_ENCRYPTIONS = {"host": "one host"}

#: The order in which nodes are listed.
_KINDS = ("controller", "data", "router", "edge", "worker")


def _place(node: NodeInfo) -> tuple[int, list[tuple[int, str]]]:
    """Where a node stands in a list; kinds of a newer cluster come last."""
    return _KINDS.index(node.kind) if node.kind in _KINDS else len(_KINDS), natural(node.name)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts worker-10 after worker-9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def state_text(state: str) -> Text:
    return Text(state, _STATE_STYLES.get(state, ""))


def pipelines_view(pipelines: Sequence[PipelineInfo]) -> RenderableType:
    """Each pipeline with its stages."""
    if not pipelines:
        return Text("nothing is deployed; `eldric-cli deploy MODEL` does")
    parts: list[RenderableType] = []
    for info in pipelines:
        parts += [Text(), _headline(info)]
        if info.message:
            parts.append(Text(f"  {info.message}", "yellow"))
        if info.stages:
            parts.append(_stages(info.stages))
        if any(stage.link for stage in info.stages):
            parts += [Text(), _links(info.stages)]
    return Group(*parts[1:])


def _headline(info: PipelineInfo) -> Text:
    model = "" if info.model == info.name else f"  model {info.model}"
    share = f" {info.progress:.0%}" if info.state == "deploying" else ""
    load = f"{info.slots_used}/{info.slots} slots, {info.queued} waiting"
    return Text.assemble(
        (info.name, "bold"),
        f"{model}  ",
        state_text(info.state),
        f"{share}  epoch {info.epoch}  context {info.context}  {load}",
    )


def _stages(stages: Sequence[StageInfo]) -> Table:
    listing = table(
        "stage", "worker", "right:pid", "layers", "right:memory", "right:step ms", "right:steps", "text:state"
    )
    for stage in stages:
        listing.add_row(
            str(stage.index),
            stage.worker,
            str(stage.pid or ""),
            layer_range(stage.layers),
            human_bytes(stage.memory_bytes),
            f"{stage.step_ms:.2f}" if stage.step_ms else "",
            str(stage.steps or ""),
            Text.assemble(state_text(stage.state), f" {stage.message}" if stage.message else ""),
        )
    return listing


def _links(stages: Sequence[StageInfo]) -> Table:
    """The ring's links, each as its sending stage sees it."""
    workers = {stage.index: stage.worker for stage in stages}
    listing = table(
        "link", "to", "transport", "encryption", "right:round trip", "right:sent", "right:under way", "text:"
    )
    for stage in stages:
        if (link := stage.link) is None:
            continue
        under_way = f"{link.queue_frames} ({human_bytes(link.queue_bytes)})" if link.queue_frames else "0"
        listing.add_row(
            f"{stage.index} > {link.to_stage}",
            workers.get(link.to_stage, ""),
            link.transport,
            Text("NONE", "red") if link.encryption == "none" else _ENCRYPTIONS.get(link.encryption, link.encryption),
            f"{link.round_trip_ms:.3g} ms" if link.round_trip_ms else "",
            human_bytes(link.bytes),
            under_way,
            Text.assemble(
                (link.closed, "red"), "; " if link.closed and link.fallback else "", (link.fallback, "yellow")
            ),
        )
    return listing


def workers_view(workers: Sequence[Worker]) -> RenderableType:
    if not workers:
        return Text("no worker has joined; `eldric-cli join` makes this machine one")
    listing = table(
        "name", "state", "right:pid", "right:threads", "right:memory", "right:used", "engine", "text:device"
    )
    for worker in sorted(workers, key=lambda worker: natural(worker.name)):
        listing.add_row(
            worker.name,
            state_text(worker.state),
            str(worker.pid),
            str(worker.cores),
            human_bytes(worker.memory_bytes),
            human_bytes(worker.memory_used_bytes),
            worker.engine,
            _device(worker),
        )
    return listing


def _device(worker: Worker) -> str:
    """What it computes on, with the name of the product."""
    known = (device for device in worker.devices if device.partition(" ")[0] == worker.device)
    return next(known, worker.device)


def nodes_view(nodes: Sequence[NodeInfo]) -> Table:
    listing = table("kind", "name", "state", "right:pid", "gRPC", "HTTP")
    for node in sorted(nodes, key=_place):
        listing.add_row(node.kind, node.name, state_text(node.state), str(node.pid), node.grpc_address, node.http_url)
    return listing
