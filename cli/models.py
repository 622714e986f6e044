"""eldric-cli models: the model store."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from eldric.cli import completion, options, replicate
from eldric.cli.connect import client_of
from eldric.cli.model_names import short_names, to_pull
from eldric.cli.options import option
from eldric.cli.output import err, human_bytes, out, print_json, table
from eldric.cli.progress import Tracker, follow_import
from eldric.cli.storing import pull_model
from eldric.client import ModelInfo
from eldric.data.names import id_of
from eldric.errors import InvalidRequest, NotFound

app = options.new_app(name="models", help="The model store: list, show, pull, add, remove, verify and replicate.")


@app.command("ls")
def list_models(
    folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False
) -> None:
    """List the models."""
    with client_of(folder, controller) as client:
        models = client.models.list()
    if as_json:
        print_json({"models": models})
        return
    if not models:
        out.print("the store is empty; add a model with `eldric-cli models add FILE`")
        return
    listing = table(
        "name",
        "architecture",
        "right:parameters",
        "type",
        "right:layers",
        "right:context",
        "right:size",
        "right:copies",
        "text:problem",
    )
    for model in models:
        listing.add_row(
            model.name,
            model.architecture,
            count(model.parameters),
            model.quantization,
            str(model.layers or ""),
            str(model.context or ""),
            human_bytes(model.size_bytes),
            copies(model),
            model.problem.removeprefix(f"{model.name}: "),
        )
    out.print(listing)


@app.command()
def show(
    name: options.Model,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Show what a model's header says."""
    with client_of(folder, controller) as client:
        details = client.models.show(name)
    if as_json:
        print_json(details)
        return
    listing = table("field", "text:value")
    info = details.info
    for field, value in (
        ("name", info.name),
        ("architecture", info.architecture),
        ("type", info.quantization),
        ("layers", info.layers),
        ("hidden size", details.hidden_size),
        ("heads", f"{details.heads} ({details.kv_heads} KV)"),
        ("vocabulary", details.vocab_size),
        ("context", info.context),
        ("size", human_bytes(info.size_bytes)),
        ("parameters", count(info.parameters)),
        ("tensors", details.tensor_count),
        ("from", details.origin),
        ("problem", info.problem),
        ("files", ", ".join(path for path, _ in details.files)),
        ("SHA-256", ", ".join(details.sha256)),
        ("data workers", ", ".join(details.data_workers)),
        ("copies", copies(info)),
        ("replication", details.replication),
    ):
        if value != "":
            listing.add_row(field, str(value))
    for key, text in sorted(details.header.items()):
        listing.add_row(key, text if len(text) <= 80 else text[:77] + "...")
    out.print(listing)


@app.command()
def add(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A GGUF file, or the first of a split set, on the store's machine.")
    ],
    name: Annotated[str, option("--name", metavar="NAME", help="Name in the store. Default: the file's.")] = "",
    move: Annotated[bool, typer.Option("--move", help="Move the file instead of linking or copying it.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Serve the file from where it lies: nothing is copied.")
    ] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Take a model file into the store."""
    if move and reference:
        raise InvalidRequest("--move and --reference exclude each other")
    mode = "move" if move else "reference" if reference else "copy"
    with client_of(folder, controller) as client:
        path = file.expanduser()
        if path.exists():
            path = path.resolve()
        elif client.cluster.folder is not None or not path.is_absolute():
            raise NotFound(f"there is no file {file}")
        named = name or id_of(path.name)
        with contextlib.closing(client.models.add_events(path, named, mode)) as events:
            model = follow_import(events, named, quiet=as_json)
    if as_json:
        print_json({"model": model})
    else:
        say_what_came(model)


@app.command()
def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A short name such as llama-70b, hf://OWNER/REPOSITORY[:QUANTIZATION], ollama://NAME[:TAG] or "
            "eldric://HOST:PORT/NAME.",
            autocompletion=completion.pullable,
        ),
    ],
    name: Annotated[str, option("--name", metavar="NAME", help="Name in the store. Default: the source's.")] = "",
    quant: Annotated[
        str, option("--quant", metavar="QUANTIZATION", help="Such as Q8_0.", default="what the short name means")
    ] = "",
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Bring a model from elsewhere into the store. Interrupted, it goes on from there when it is asked for again."""
    wanted = to_pull(model, quant, short_names())
    with client_of(folder, controller) as client:
        resolved, info = pull_model(client, wanted.source, name or wanted.name, quiet=as_json)
    if as_json:
        print_json({"model": info, "resolved": resolved})
    else:
        say_what_came(info)


@app.command("rm")
def remove(
    name: options.Model,
    force: Annotated[
        bool, typer.Option("--force", help="Also a deployed one: its pipelines cannot be loaded again.")
    ] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Remove a model, or what an interrupted pull left of it.

    A model that is deployed stays.
    """
    with client_of(folder, controller) as client:
        client.models.remove(name, force=force)
    if as_json:
        print_json({"removed": name})
    else:
        out.print(f"{name} is removed")


@app.command()
def verify(
    name: options.Model,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Compare a model's files with the checksums kept for them.

    They were made when it was added. What is found damaged is not deployed any more.
    """
    with client_of(folder, controller) as client, Tracker(quiet=as_json) as tracker:
        with contextlib.closing(client.models.verify_events(name)) as events:
            for event in events:
                tracker.update(name, event.phase, event.done_bytes, event.total_bytes)
        tracker.finish("sound")
    if as_json:
        print_json({"model": name, "sound": True})
    else:
        out.print(f"{name} is sound")


replicate.register(app)  # after the others, as help lists them


def say_what_came(model: ModelInfo) -> None:
    """A model that is new in the store."""
    out.print(f"{model.name}: {model.architecture}, {model.layers} layers, {human_bytes(model.size_bytes)}")
    if model.problem:
        err.print(f"it cannot be deployed: {model.problem}", style="yellow")


def copies(model: ModelInfo) -> str:
    """How many data workers hold it, and how many should: "2", "1 of 2"."""
    return f"{model.copies} of {model.copies_wanted}" if model.copies_wanted else str(model.copies)


def count(number: float) -> str:
    """Parameters as people count them: "135 M", "1.7 B"."""
    for divisor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= divisor:
            return f"{number / divisor:.3g} {unit}"
    return f"{number:.0f}" if number else ""
