"""What is in a store's folder. Headers are parsed again only when their files change."""

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eldric.data.checksums import FileSums
from eldric.data.header import ModelHeader, read_header
from eldric.data.manifest import NAME, BrokenManifest, Manifest, Reference, UnknownVersion
from eldric.data.model import StoredFile, StoredModel
from eldric.data.names import check_id, id_of, is_later_part
from eldric.data.sums import Sums
from eldric.engine.errors import InvalidModel
from eldric.engine.gguf import part_paths
from eldric.errors import DataLoss, EldricError, InvalidRequest, NotReady

log = logging.getLogger(__name__)


#: What to do about a file that changed where it lies.
_AGAIN = "remove the model from the store and add it again"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model is: `name` is its folder, or its (first) file."""

    name: str
    imported: bool


#: A model's files as they should be, and what is there: None for a missing one.
_Files = Sequence[tuple[StoredFile, os.stat_result | None]]


class Index:
    """Finds the models of a folder. Thread-safe; everything blocks."""

    def __init__(self, folder: Path, sums: Sums, wrong_sums: Sums) -> None:
        """wrong_sums: those that a check found, of files that should have others; by path below the folder."""
        self._folder = folder  # without links
        self._sums, self._wrong_sums = sums, wrong_sums
        self._headers: dict[str, tuple[object, ModelHeader | InvalidModel]] = {}
        self._manifests: dict[str, tuple[object, Manifest]] = {}
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def all(self) -> list[StoredModel]:
        """All models by name, damaged ones too. Raises NotReady when the folder cannot be read."""
        places = self._places()
        models = [self._load(model, places[model]) for model in sorted(places)]
        with self._lock:
            for gone in self._headers.keys() - places.keys():
                del self._headers[gone]
            for gone in self._manifests.keys() - places.keys():
                del self._manifests[gone]
        return [model for model in models if model is not None]

    def find(self, model: str) -> StoredModel | None:
        """A model by name, or None. Raises InvalidRequest for what is no name."""
        check_id(model)
        if self._has_manifest(model):
            return self._load(model, _Place(model, imported=True))
        place = self._places().get(model)
        return self._load(model, place) if place else None

    def _places(self) -> dict[str, _Place]:
        """What is in the folder, by model name. An imported model hides a file of the same name."""
        try:
            with os.scandir(self._folder) as entries:
                names = sorted((entry.name, _is_folder(entry)) for entry in entries if entry.name[0] != ".")
        except OSError as error:
            raise NotReady(f"the model store {self._folder} cannot be read: {error.strerror}") from None
        imported: dict[str, _Place] = {}
        by_hand: dict[str, _Place] = {}
        for name, is_folder in names:
            with contextlib.suppress(InvalidRequest):
                if is_folder and self._has_manifest(name):
                    imported[check_id(name)] = _Place(name, imported=True)
                elif not is_folder and name.endswith(".gguf") and name.isprintable() and not is_later_part(name):
                    kept = by_hand.setdefault(id_of(name), _Place(name, imported=False))
                    if kept.name != name:
                        self._warn(name, f"has the same name as {kept.name}")
        for model in imported.keys() & by_hand.keys():
            self._warn(by_hand[model].name, "has the name of an imported model")
        return {**by_hand, **imported}

    def _has_manifest(self, name: str) -> bool:
        """False, too, for a folder that may not be looked into."""
        return os.path.isfile(self._folder / name / NAME)

    def _warn(self, name: str, why: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("event=file_not_listed file=%r reason=%r", name, why)

    def _load(self, model: str, place: _Place) -> StoredModel | None:
        """The model at a place; None when it is not there any more."""
        files: _Files = ()
        header: ModelHeader | None = None
        error: EldricError | None = None
        origin = ""
        try:
            manifest = self._manifest(place.name) if place.imported else None
            origin = manifest.source if manifest else ""
            files = self._imported_files(place.name, manifest) if manifest else self._files_by_hand(place.name)
            _check_files(files)
            found = self._header(model, files)
            if manifest and manifest.header_sha256 not in ("", found.sha256):
                raise DataLoss(f"its header changed since it was referenced: {_AGAIN}")
            self._check_sums(model, files)
            header = found
        except FileNotFoundError:
            return None
        except UnknownVersion as reason:
            error = NotReady(f"{model}: {reason}")
        except (BrokenManifest, InvalidModel, DataLoss) as reason:
            error = DataLoss(f"{model}: {reason}")
        except OSError as reason:
            error = DataLoss(f"{model}: {reason.filename or place.name} cannot be read: {reason.strerror}")
        return StoredModel(model, self._folder, tuple(file for file, _ in files), place.imported, header, error, origin)

    def _check_sums(self, model: str, files: _Files) -> None:
        """Raises DataLoss when a file, as it is now, was found to be damaged."""
        for file, status in files:
            wrong = self._wrong_sums.get(str(file.path), status) if status else FileSums()
            if wrong.sha256 not in ("", file.sha256):
                raise DataLoss(f"{file.path} is damaged: `eldric-cli models verify {model}` says where")

    def _manifest(self, name: str) -> Manifest:
        """The manifest of a folder, from the cache while it has not changed: that of a large model takes time."""
        version = _version(os.stat(self._folder / name / NAME))
        known = self._manifests.get(name)
        if known is None or known[0] != version:
            known = version, Manifest.load(self._folder / name)
            with self._lock:
                self._manifests[name] = known
        return known[1]

    def _imported_files(self, name: str, manifest: Manifest) -> _Files:
        paths = [Path(name, file.name) for file in manifest.files]
        return [
            (StoredFile(path, file.size_bytes, file.sums), self._status(path, file.reference))
            for path, file in zip(paths, manifest.files, strict=True)
        ]

    def _files_by_hand(self, name: str) -> _Files:
        files: list[tuple[StoredFile, os.stat_result | None]] = []
        for path in part_paths(Path(name)):
            status = self._status(path)
            if status:
                files.append((StoredFile(path, status.st_size, self._sums.get(path.name, status)), status))
            else:
                files.append((StoredFile(path, 0, FileSums()), None))
        if files[0][1] is None:
            raise FileNotFoundError(name)
        return files

    def _status(self, path: Path, reference: Reference | None = None) -> os.stat_result | None:
        """Status of a file of the store; None if it is missing. Raises DataLoss for what is none, or lies elsewhere,
        unless it is referenced there and did not change."""
        try:
            real = (self._folder / path).resolve(strict=True)
            status = real.stat()
        except FileNotFoundError:
            if reference:
                raise DataLoss(f"the file {reference.path}, which it refers to, is missing") from None
            return None
        except RuntimeError:
            raise DataLoss(f"{path} is a link to itself") from None
        if reference:
            if str(real) != reference.path or status.st_mtime_ns != reference.modified_ns:
                raise DataLoss(f"{reference.path} changed since it was referenced: {_AGAIN}")
        elif not real.is_relative_to(self._folder):
            raise DataLoss(f"{path} is a link out of the model store: import the file that it points to")
        if not stat.S_ISREG(status.st_mode):
            raise DataLoss(f"{path} is not a file")
        return status

    def _header(self, model: str, files: _Files) -> ModelHeader:
        """The header, from the cache while no file has changed. Raises InvalidModel, OSError."""
        key = [(file.path, status and _version(status)) for file, status in files]
        known = self._headers.get(model)
        if known is None or known[0] != key:
            known = key, _parse(self._folder / files[0][0].path)
            with self._lock:
                self._headers[model] = known
        if isinstance(known[1], InvalidModel):
            raise known[1]
        return known[1]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _check_files(files: _Files) -> None:
    for file, status in files:
        if status is None:
            raise DataLoss(f"the file {file.path} is missing")
        if status.st_size != file.size_bytes:
            raise DataLoss(f"{file.path} has {status.st_size} bytes, it had {file.size_bytes} when it was imported")


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parse(path: Path) -> ModelHeader | InvalidModel:
    try:
        return read_header(path)
    except InvalidModel as error:
        return error
