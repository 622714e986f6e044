"""What a person may write for a model: its name in the store, a short name, a file, or where it comes from."""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_path, user_config_path

from eldric.data.sources import FORMS, HubSource, parse_source
from eldric.errors import InvalidRequest, NotFound
from eldric.nearest import meant

#: The user's own short names, in the form of short_names.toml.
USER_FILE = user_config_path("eldric") / "models.toml"


@dataclass(frozen=True, slots=True)
class ShortName:
    """Where a well-known model comes from: a repository of GGUF files on Hugging Face, and which of them."""

    name: str
    repository: str
    quantization: str

    @property
    def base(self) -> str:
        """How its files' names begin: the repository's name without "-GGUF"."""
        tail = self.repository.rpartition("/")[2]
        return tail[:-5] if tail.lower().endswith("-gguf") else tail

    def is_called(self, name: str) -> bool:
        """Whether a file's or a model's name is this model's: as its files are called, in any case, with '-', '_' or
        '.' between the words."""
        plain = _plain(name.removesuffix(".gguf"))
        wanted = _plain(f"{self.base}-{self.quantization}")
        return plain == wanted or plain.startswith(f"{wanted}-00001-of-")

    @property
    def source(self) -> str:
        return f"hf://{self.repository}:{self.quantization}"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def short_names(user_file: Path = USER_FILE) -> dict[str, ShortName]:
    """The table that comes with Eldric, and over it the user's own. Raises InvalidRequest for a broken user file."""
    table = _parse(files("eldric.cli").joinpath("short_names.toml").read_text(), "short_names.toml")
    if user_file.exists():
        table.update(_parse(user_file.read_text(errors="replace"), str(user_file)))
    return table


def _parse(text: str, where: str) -> dict[str, ShortName]:
    try:
        entries = tomllib.loads(text)
        table = {name: ShortName(name, entry["repository"], entry["quantization"]) for name, entry in entries.items()}
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{where} is no table of short names ({error}); write [NAME] with repository and quantization"
        ) from error
    for name, entry in table.items():
        if not isinstance(entry.repository, str) or not isinstance(entry.quantization, str):
            raise InvalidRequest(f"{where}: repository and quantization of {name} must be text")
    return table


@dataclass(frozen=True, slots=True)
class Stored:
    """What was asked for is in the store, under this name."""

    name: str


@dataclass(frozen=True, slots=True)
class OnDisk:
    """It is a file, which must be taken into the store first."""

    path: Path


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """It must be pulled first. source: a URI, as the model store takes it. name: in the store; empty: the source's."""

    source: str
    name: str


def to_pull(model: str, quantization: str, table: Mapping[str, ShortName]) -> Elsewhere:
    """What a short name or a URI means to `models pull`; quantization: another than is meant by itself, or "".

    Raises NotFound for a name that is not in the table, InvalidRequest for a URI that names a quantization already.
    """
    if "://" in model:
        source = parse_source(model)
        if not quantization:
            return Elsewhere(model, "")
        if not isinstance(source, HubSource) or source.file or source.quantization:
            raise InvalidRequest(f"{model} leaves no choice of a quantization: leave --quant out")
        return Elsewhere(f"{model}:{quantization}", "")
    known = table.get(model)
    if known is None:
        raise NotFound(
            f"{model!r} is no short name; pull one of {', '.join(sorted(table))}, or {FORMS}{_meant(model, table)}"
        )
    if not quantization or quantization.lower() == known.quantization.lower():
        return Elsewhere(known.source, model)
    return Elsewhere(f"hf://{known.repository}:{quantization}", f"{model}-{quantization.lower()}")


def resolve(
    model: str, stored: Collection[str], table: Mapping[str, ShortName], folders: Collection[Path]
) -> Stored | OnDisk | Elsewhere:
    """What a person means: a name of the store comes first, then a URI, then a file, then a short name, whose model is
    looked for in the store and in `folders`, and is elsewhere if it is in neither. Raises NotFound, InvalidRequest."""
    if model in stored:
        return Stored(model)
    if "://" in model:
        return to_pull(model, "", table)
    path = Path(model).expanduser()
    if path.is_file():
        return OnDisk(path.resolve())
    if path.suffix == ".gguf" or "/" in model:
        raise NotFound(f"there is no file {path}")
    known = table.get(model)
    if known is None:
        there = ", ".join(sorted(stored)) or "none"
        raise NotFound(
            f"no model {model!r}: the store has {there}; `eldric-cli models add FILE --name NAME` adds a file, "
            f"`eldric-cli models pull` gets {', '.join(sorted(table))}, or {FORMS}{_meant(model, {*stored, *table})}"
        )
    for name in sorted(stored):
        if known.is_called(name):
            return Stored(name)
    for file in _gguf_files(folders):
        if known.is_called(file.name):
            return OnDisk(file)
    return Elsewhere(known.source, model)


def _meant(model: str, known: Collection[str]) -> str:
    question = meant(model, sorted(known))
    return f"; {question}" if question else ""


def _gguf_files(folders: Collection[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.rglob("*.gguf"))


def model_folders() -> list[Path]:
    """Where models that were downloaded before may lie: here, our own cache, Hugging Face's and llama.cpp's."""
    cache = Path.home() / ".cache"
    known = (user_cache_path("eldric") / "models", cache / "huggingface" / "hub", cache / "llama.cpp")
    return [folder for folder in known if folder.is_dir()]
