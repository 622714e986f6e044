"""eldric-cli models: the model store."""

from pathlib import Path
from typing import Annotated

import typer

from eldric.cli import options
from eldric.cli.connect import client_of
from eldric.cli.imports import follow_import, progress_bar
from eldric.cli.model_names import store_name
from eldric.cli.output import human_bytes, out, print_json, table
from eldric.errors import NotFound

app = typer.Typer(name="models", help="The model store: list, show, add, remove and verify.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the model in the store.")]


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
    listing = table("name", "architecture", "right:parameters", "type", "right:layers", "right:context", "right:size")
    for model in models:
        listing.add_row(
            model.name,
            model.architecture,
            f"{model.parameters / 1e9:.2f} B",
            model.quantization,
            str(model.layers),
            str(model.context),
            human_bytes(model.size_bytes),
        )
    out.print(listing if models else "the store is empty; add a model with `eldric-cli models add FILE`")


@app.command()
def show(
    name: Name, folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False
) -> None:
    """Show what a model's header says."""
    with client_of(folder, controller) as client:
        details = client.models.show(name)
    if as_json:
        print_json(details)
        return
    listing = table("field", "value")
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
        ("files", ", ".join(details.files)),
        ("SHA-256", ", ".join(details.sha256)),
    ):
        listing.add_row(field, str(value))
    for key, text in sorted(details.header.items()):
        listing.add_row(key, text if len(text) <= 80 else text[:77] + "...")
    out.print(listing)


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A GGUF file, or the first of a split set, on the store's machine.")],
    name: Annotated[str, typer.Option("--name", help="Name in the store. Default: the file's.")] = "",
    move: Annotated[bool, typer.Option("--move", help="Move the file instead of linking or copying it.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Take a model file into the store."""
    path = file.expanduser().resolve()
    if not path.exists():
        raise NotFound(f"there is no file {file}")
    with client_of(folder, controller) as client:
        events = client.models.add_events(path, name or store_name(path), "move" if move else "copy")
        model = follow_import(events, quiet=as_json)
    if as_json:
        print_json({"model": model})
    else:
        out.print(f"{model.name}: {model.architecture}, {model.layers} layers, {human_bytes(model.size_bytes)}")


@app.command("rm")
def remove(
    name: Name, folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False
) -> None:
    """Remove a model from the store."""
    with client_of(folder, controller) as client:
        client.models.remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        out.print(f"{name} is removed")


@app.command()
def verify(
    name: Name, folder: options.Dir = None, controller: options.Controller = None, as_json: options.Json = False
) -> None:
    """Compare a model's files with the checksums that were kept when it was added."""
    with client_of(folder, controller) as client, progress_bar(as_json) as progress:
        line = progress.add_task("verifying", total=None)
        for event in client.models.verify_events(name):
            progress.update(line, completed=event.done_bytes, total=event.total_bytes or None)
    if as_json:
        print_json({"model": name, "sound": True})
    else:
        out.print(f"{name} is sound")
