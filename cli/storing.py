"""From what a person wrote for a model to its name in the store."""

import contextlib
from pathlib import Path

from eldric.cli.model_names import OnDisk, Stored, model_folders, resolve, short_names
from eldric.cli.progress import follow_import
from eldric.client import Client
from eldric.data.names import id_of
from eldric.errors import AlreadyExists


def ensure_in_store(client: Client, model: str, *, quiet: bool) -> str:
    """The name in the store of what a person wrote; a file is taken into the store first.

    Raises NotFound that says how to get what is missing.
    """
    stored = {info.name: info for info in client.models.list()}
    match resolve(model, stored, short_names(), model_folders()):
        case Stored(name):
            return name
        case OnDisk(path):
            name = id_of(path.name) if Path(model).expanduser().is_file() else model
            if name not in stored:
                with contextlib.closing(client.models.add_events(path, name)) as events:
                    follow_import(events, name, quiet=quiet)
            elif path.stat().st_size not in (size for _, size in client.models.show(name).files):
                add = f"eldric-cli models add {path} --name OTHER"
                raise AlreadyExists(f"the store has another model {name}: `{add}` and `eldric-cli deploy OTHER`")
            return name
