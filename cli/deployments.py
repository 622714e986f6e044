"""eldric-cli deploy, undeploy and rebalance."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from eldric.cli import completion, options
from eldric.cli.connect import client_of
from eldric.cli.options import option
from eldric.cli.output import err, human_bytes, out, print_json, table
from eldric.cli.progress import follow_deploy, layer_range
from eldric.cli.storing import ensure_in_store
from eldric.cli.units import parse_numbers
from eldric.client import Client, DeployEvent, Plan
from eldric.errors import EldricError, NotFound

app = options.new_app()

#: Longest wait for an interrupted deployment to be undone, in seconds.
_UNDO_S = 60.0


@app.command()
def deploy(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model of the store, a GGUF file, or what `models pull` takes: llama-70b, hf://OWNER/REPOSITORY ...",
            autocompletion=completion.deployable,
        ),
    ],
    name: Annotated[
        str,
        option("--name", metavar="NAME", help="Name of the pipeline. Default: the model's."),
    ] = "",
    stages: Annotated[
        int,
        option("--stages", metavar="N", help="Number of stages. Default: as few as fit."),
    ] = 0,
    context: Annotated[
        int,
        option("--ctx", metavar="TOKENS", help="Tokens per sequence. Default: the model's, up to 4096."),
    ] = 0,
    slots: Annotated[
        int,
        option("--slots", metavar="N", help="Sequences at once. Default: 4."),
    ] = 0,
    workers: Annotated[
        str,
        option(
            "--workers",
            metavar="NAME,...",
            help="Only these workers, separated by commas, in ring order.",
            autocompletion=completion.workers,
        ),
    ] = "",
    layers: Annotated[
        str,
        option("--layers", metavar="N,N,...", help="Layers of each stage, such as 10,10,12. Default: balanced."),
    ] = "",
    chunk: Annotated[
        int,
        option("--chunk", metavar="TOKENS", help="Prompt tokens in one step. Default: 64."),
    ] = 0,
    lanes: Annotated[
        int,
        option("--lanes", metavar="N", help="Most micro-batches in flight. Default: one per stage."),
    ] = 0,
    threads: Annotated[
        int,
        option("--threads", metavar="N", help="Compute threads of each stage. Default: the worker's."),
    ] = 0,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact", help="Tokens that do not depend on the batch.", show_default="where it is cheap"
        ),
    ] = None,
    weights: Annotated[str, option("--weights", metavar="HOW", help="auto (default), mapped or repacked.")] = "auto",
    kv_type: Annotated[str, option("--kv-type", metavar="TYPE", help="f16 (default) or f32.")] = "f16",
    transport: Annotated[
        str,
        option(
            "--transport",
            metavar="SCHEME",
            help="zmq, shm, ucx, relay or another: every link takes it, or the deployment fails. auto: each link takes "
            "the best that both its workers offer, and the next best where that one fails.",
            default="auto",
        ),
    ] = "auto",
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
        stored = ensure_in_store(client, model, quiet=as_json, pull=not dry_run)
        if dry_run:
            show_plan(client.plan(stored, **settings), as_json)
            return
        began = time.monotonic()
        events = client.deploy_events(stored, **settings)
        seen: list[DeployEvent] = []
        try:
            with contextlib.closing(events):
                info = follow_deploy(_noting(events, seen), quiet=as_json)
        except (KeyboardInterrupt, SystemExit):
            if seen:  # before the first event there is nothing, or another pipeline of that name
                _undo(client, name or stored, quiet=as_json)
            raise
        seconds = time.monotonic() - began
    if as_json:
        print_json({"pipeline": info, "seconds": round(seconds, 3)})
    else:
        out.print(f"{info.name} is ready after {seconds:.1f} s")


@app.command()
def undeploy(
    name: options.Pipeline,
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
    name: options.Pipeline,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Plan a pipeline again over the workers there are now, and move to the new plan.

    Layers are shared by how fast the pipeline's stages have been. It moves only when the new plan differs. Sequences
    that run at the switch end with an error.
    """
    with client_of(folder, controller) as client, contextlib.closing(client.rebalance_events(name)) as events:
        info = follow_deploy(events, quiet=as_json)
    if as_json:
        print_json({"pipeline": info})
    else:
        out.print(f"{info.name} is ready, epoch {info.epoch}")


def _noting(events: Iterable[DeployEvent], seen: list[DeployEvent]) -> Iterator[DeployEvent]:
    for event in events:
        seen.append(event)
        yield event


def _undo(client: Client, name: str, *, quiet: bool) -> None:
    """The controller undoes what nobody waits for any more: stay until it has, so that the next command sees it."""
    if not quiet:
        err.print("undoing the deployment", style="dim")
    deadline = time.monotonic() + _UNDO_S
    try:
        while time.monotonic() < deadline:
            if client.status(name)[0].state == "ready":  # it was done just before
                client.undeploy(name)
            time.sleep(0.05)
    except NotFound:
        return
    except EldricError as error:
        err.print(f"could not see whether it was undone: {error.message}", style="yellow")


def show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json({"plan": plan})
        return
    sizes = ("right:weights", "right:KV cache", "right:compute", "right:available")
    listing = table("stage", "worker", "layers", *sizes, "text:links by")
    for stage in plan.stages:
        bytes_of = (stage.weights_bytes, stage.kv_bytes, stage.compute_bytes, stage.available_bytes)
        row = str(stage.index), stage.worker, layer_range(stage.layers), *map(human_bytes, bytes_of)
        listing.add_row(*row, ", else ".join(stage.transports))
    out.print(listing)
    for worker, reason in plan.excluded.items():
        out.print(f"left out: {worker}: {reason}", style="dim")
