"""Names for shell completion: asked of the cluster, within a second, and never a complaint."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from eldric.client import Client

#: Longest that a person waits after pressing the tab key, in seconds.
TIMEOUT_S = 1.0


def _names(context: typer.Context, incomplete: str, ask: Callable[["Client"], list[str]]) -> list[str]:
    try:
        from eldric.cli.connect import client_of

        folder = context.params.get("folder")
        controller = context.params.get("controller")
        with client_of(Path(folder) if folder else None, controller, timeout_s=TIMEOUT_S) as client:
            return sorted(name for name in ask(client) if name.startswith(incomplete))
    except Exception:  # whatever it is, a half-typed line is no place to say it
        return []


def pipelines(ctx: typer.Context, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, lambda client: [info.name for info in client.status()])


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, lambda client: [info.name for info in client.models.list()])


def workers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of a list of names, the last is completed."""
    before, comma, last = incomplete.rpartition(",")
    found = _names(ctx, last, lambda client: [worker.name for worker in client.workers()])
    return [f"{before}{comma}{name}" for name in found if name not in before.split(",")]


def data_workers(ctx: typer.Context, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, lambda client: [node.name for node in client.nodes() if node.kind == "data"])


def local_nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of a local cluster, whether it runs or not."""
    try:
        from eldric.cli.connect import local_folder
        from eldric.cli.local import LocalCluster

        folder = ctx.params.get("folder")
        nodes = LocalCluster.load(local_folder(Path(folder) if folder else None)).nodes
        return sorted(node.name for node in nodes if node.name.startswith(incomplete))
    except Exception:
        return []


def pullable(incomplete: str) -> list[str]:
    """Short names."""
    try:
        from eldric.cli.model_names import short_names

        return sorted(name for name in short_names() if name.startswith(incomplete))
    except Exception:
        return []


def deployable(ctx: typer.Context, incomplete: str) -> list[str]:
    """Models of the store, and short names."""
    return sorted({*models(ctx, incomplete), *pullable(incomplete)})
