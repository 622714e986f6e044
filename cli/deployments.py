"""eldric-cli deploy, undeploy, rebalance and status."""

import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from eldric.cli import options
from eldric.cli.connect import client_of
from eldric.cli.model_names import ensure_in_store
from eldric.cli.output import err, human_bytes, out, print_json, table
from eldric.client import DeployEvent, PipelineInfo, Plan, StageProgress
from eldric.errors import InvalidRequest, Unavailable

app = typer.Typer()


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="A model of the store, a short name such as llama-70b, or a GGUF file.")],
    name: Annotated[str, typer.Option("--name", help="Name of the pipeline. Default: the model's.")] = "",
    stages: Annotated[int, typer.Option("--stages", help="Number of stages. 0: as few as fit.")] = 0,
    context: Annotated[int, typer.Option("--ctx", help="Tokens per sequence. 0: the model's, at most 4096.")] = 0,
    slots: Annotated[int, typer.Option("--slots", help="Sequences at once. 0: 4.")] = 0,
    workers: Annotated[
        str, typer.Option("--workers", help="Only these workers, separated by commas, in ring order.")
    ] = "",
    layers: Annotated[
        str, typer.Option("--layers", help="Layers of each stage, such as 10,10,12. Default: balanced.")
    ] = "",
    chunk: Annotated[int, typer.Option("--chunk", help="Prompt tokens in one step. 0: 128.")] = 0,
    lanes: Annotated[int, typer.Option("--lanes", help="Micro-batches in flight. 0: one per stage.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="Compute threads of each stage. 0: the worker's.")] = 0,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Tokens that do not depend on the batch.", show_default="exact"),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="auto, mapped or repacked.")] = "auto",
    kv_type: Annotated[str, typer.Option("--kv-type", help="f16 or f32.")] = "f16",
    transport: Annotated[str, typer.Option("--transport", help="Scheme of the tensor transport.")] = "",
    insecure_tensors: Annotated[
        bool, typer.Option("--insecure-tensors", help="Do not encrypt the tensor channels.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Deploy a model over the cluster's workers and wait until it is ready. Ctrl-C undoes it."""
    settings: dict[str, Any] = {
        "name": name,
        "stages": stages,
        "workers": [part.strip() for part in workers.split(",") if part.strip()],
        "layers": parse_numbers(layers),
        "transport": transport,
        "insecure_tensors": insecure_tensors,
        "context": context,
        "slots": slots,
        "chunk": chunk,
        "lanes": lanes,
        "threads": threads,
        "exact": exact,
        "weights": weights,
        "kv_type": kv_type,
    }
    with client_of(folder, controller) as client:
        stored = ensure_in_store(client, model, quiet=as_json)
        if dry_run:
            _show_plan(client.plan(stored, **settings), as_json)
            return
        began = time.monotonic()
        info = follow_deploy(client.deploy_events(stored, **settings), quiet=as_json)
        seconds = time.monotonic() - began
    if as_json:
        print_json({"pipeline": info, "seconds": round(seconds, 3)})
    else:
        out.print(f"{info.name} is ready after {seconds:.1f} s")


@app.command()
def undeploy(
    name: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """End a pipeline: its sequences end, its workers give their memory back."""
    with client_of(folder, controller) as client:
        client.undeploy(name)
    if as_json:
        print_json({"undeployed": name})
    else:
        out.print(f"{name} is gone")


@app.command()
def rebalance(
    name: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Plan a pipeline again over the workers there are now, and move to the new plan when it differs."""
    with client_of(folder, controller) as client:
        info = follow_deploy(client.rebalance_events(name), quiet=as_json)
    if as_json:
        print_json({"pipeline": info})
    else:
        out.print(f"{info.name} is ready, epoch {info.epoch}")


@app.command()
def status(
    name: Annotated[str, typer.Argument(help="Only this pipeline.")] = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second, until Ctrl-C.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Show the pipelines with their stages: layers, memory, step time, state."""
    with client_of(folder, controller) as client:
        if not watch:
            _show_status(client.status(name), as_json)
            return
        while True:
            pipelines = client.status(name)
            if out.is_terminal:
                out.clear()
            _show_status(pipelines, as_json)
            time.sleep(1.0)


def follow_deploy(events: Iterable[DeployEvent], *, quiet: bool) -> PipelineInfo:
    """Show a deployment's progress, one line per stage, and return the pipeline that came of it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    lines: dict[int, TaskID] = {}
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as progress:
        for event in events:
            match event:
                case Plan(stages=stages):
                    for stage in stages:
                        title = f"stage {stage.index}  layers {_range(stage.layers)}  {stage.worker}"
                        lines[stage.index] = progress.add_task(title, total=stage.weights_bytes or 1, phase="waiting")
                        if not quiet and not err.is_terminal:
                            err.print(title)
                case StageProgress():
                    if event.index in lines:
                        progress.update(
                            lines[event.index],
                            completed=event.done_bytes or None,
                            total=event.total_bytes or None,
                            phase=event.phase,
                        )
                case PipelineInfo():
                    return event
    raise Unavailable("the controller ended the deployment without a word")


def parse_numbers(text: str) -> list[int]:
    """ "10,10,12" as numbers. Raises InvalidRequest."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequest(f"{text!r} is no list of numbers; write for example 10,10,12") from None


def show_pipelines(pipelines: list[PipelineInfo]) -> None:
    """The table of stages, for people."""
    for info in pipelines:
        load = f"{info.slots_used}/{info.slots} slots, {info.queued} waiting"
        out.print(f"[bold]{info.name}[/]  {info.state}  epoch {info.epoch}  context {info.context}  {load}")
        if info.message:
            out.print(f"  {info.message}", style="yellow")
        listing = table("stage", "worker", "layers", "right:memory", "right:step ms", "right:steps", "link", "state")
        for stage in info.stages:
            link = f"{stage.transport} {'encrypted' if stage.encrypted else 'PLAIN'}" if stage.transport else ""
            listing.add_row(
                str(stage.index),
                stage.worker,
                _range(stage.layers),
                human_bytes(stage.memory_bytes),
                f"{stage.step_ms:.2f}",
                str(stage.steps),
                link,
                stage.state,
            )
        out.print(listing)


def _show_status(pipelines: list[PipelineInfo], as_json: bool) -> None:
    if as_json:
        print_json({"pipelines": pipelines})
    elif pipelines:
        show_pipelines(pipelines)
    else:
        out.print("nothing is deployed")


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json({"plan": plan})
        return
    listing = table("stage", "worker", "layers", "right:weights", "right:KV cache", "right:compute", "right:available")
    for stage in plan.stages:
        sizes = (stage.weights_bytes, stage.kv_bytes, stage.compute_bytes, stage.available_bytes)
        listing.add_row(str(stage.index), stage.worker, _range(stage.layers), *map(human_bytes, sizes))
    out.print(listing)
    for worker, reason in plan.excluded.items():
        out.print(f"left out: {worker}: {reason}", style="dim")


def _range(layers: tuple[int, int]) -> str:
    return f"{layers[0]}-{layers[1] - 1}"
