"""What a person may write for a model: its name in the store, a short name, or a file."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from platformdirs import user_config_path

from eldric.cli.imports import follow_import
from eldric.client import Client
from eldric.errors import InvalidRequest, NotFound

#: The user's own short names, in the form of short_names.toml.
USER_FILE = user_config_path("eldric") / "models.toml"


@dataclass(frozen=True, slots=True)
class ShortName:
    """Where a well-known model comes from."""

    name: str
    repository: str
    quantization: str


def short_names(user_file: Path = USER_FILE) -> dict[str, ShortName]:
    """The table that comes with Eldric, and over it the user's own. Raises InvalidRequest for a broken user file."""
    table = _parse(files("eldric.cli").joinpath("short_names.toml").read_text(), "short_names.toml")
    if user_file.exists():
        table.update(_parse(user_file.read_text(), str(user_file)))
    return table


def _parse(text: str, where: str) -> dict[str, ShortName]:
    try:
        return {
            name: ShortName(name, entry["repository"], entry["quantization"])
            for name, entry in tomllib.loads(text).items()
        }
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{where} is no table of short names ({error}); write [NAME] with repository and quantization"
        ) from error


def ensure_in_store(client: Client, model: str, *, quiet: bool) -> str:
    """The name in the store of what a person wrote; a file is taken into the store first.

    Raises NotFound that says how to get what is missing.
    """
    stored = {info.name for info in client.models.list()}
    if model in stored:
        return model
    path = Path(model).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        name = store_name(path)
        if name not in stored:
            follow_import(client.models.add_events(path.resolve(), name), quiet=quiet)
        return name
    known = short_names().get(model)
    if known is None:
        raise NotFound(
            f"no model {model!r}: the store has {', '.join(sorted(stored)) or 'none'}; add one with "
            "`eldric-cli models add FILE --name NAME`"
        )
    raise NotFound(
        f"{model} is {known.repository}, quantization {known.quantization}, which is not in the store: download its "
        f"GGUF file and `eldric-cli models add FILE --name {model}`"
    )


def store_name(path: Path) -> str:
    """A name for a file's model: its own without the ending and the number of a split set."""
    stem = path.name.removesuffix(".gguf")
    base, separator, count = stem.rpartition("-of-")
    if separator and count.isdigit() and base.rpartition("-")[2].isdigit():
        stem = base.rpartition("-")[0]
    return stem
