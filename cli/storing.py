"""From what a person wrote for a model to its name in the store."""

import contextlib
from pathlib import Path

from eldric.cli.model_names import Elsewhere, OnDisk, Stored, model_folders, resolve, short_names
from eldric.cli.output import err, human_bytes
from eldric.cli.progress import follow_import, follow_pull
from eldric.client import Client, ImportProgress, ModelInfo, PullEvent, ResolvedSource
from eldric.data.names import id_of
from eldric.errors import AlreadyExists, NotFound


def ensure_in_store(client: Client, model: str, *, quiet: bool, pull: bool = True) -> str:
    """The name in the store of what a person wrote; a file is taken into the store first, and a model from elsewhere
    is pulled.

    Raises NotFound that says how to get what is missing: with pull False also for a model from elsewhere.
    """
    stored = {info.name: info for info in client.models.list()}
    match resolve(model, stored, short_names(), model_folders()):
        case Stored(name):
            return name
        case Elsewhere(source, name):
            if not pull:
                raise NotFound(f"{model} is not in the store: `eldric-cli models pull {model}` gets it from {source}")
            return pull_model(client, source, name, quiet=quiet, to_deploy=True)[1].name
        case OnDisk(path):
            name = id_of(path.name) if Path(model).expanduser().is_file() else model
            if name not in stored:
                with contextlib.closing(client.models.add_events(path, name)) as events:
                    follow_import(events, name, quiet=quiet)
            elif path.stat().st_size not in (size for _, size in client.models.show(name).files):
                add = f"eldric-cli models add {path} --name OTHER"
                raise AlreadyExists(f"the store has another model {name}: `{add}` and `eldric-cli deploy OTHER`")
            return name


def pull_model(
    client: Client, source: str, name: str, *, quiet: bool, to_deploy: bool = False
) -> tuple[ResolvedSource, ModelInfo]:
    """Pulls a model, with progress on stderr; name "" takes the source's. Interrupted, it says what is kept.

    to_deploy: raises InvalidRequest, before anything is fetched, for what the source says cannot be deployed.
    """
    seen: list[PullEvent] = []
    try:
        with contextlib.closing(client.models.pull_events(source, name)) as events:
            return follow_pull(events, seen, quiet=quiet, to_deploy=to_deploy)
    except (KeyboardInterrupt, SystemExit):
        last = seen[-1] if seen else None
        if not quiet and isinstance(last, ImportProgress) and last.total_bytes:
            sizes = f"{human_bytes(last.done_bytes)} of {human_bytes(last.total_bytes)}"
            err.print(f"stopped: {sizes} are kept, the same command goes on from there", style="dim")
        raise
