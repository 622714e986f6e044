"""Brings model files into a store: all of a model, or nothing."""

import contextlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from eldric.data import checksums
from eldric.data.header import ModelHeader, read_header
from eldric.data.manifest import Manifest, ManifestFile, Reference
from eldric.data.model import StoredModel
from eldric.data.names import check_id, id_of, stored_names
from eldric.data.store import ModelStore, Report
from eldric.engine.errors import InvalidModel
from eldric.errors import DataLoss, InvalidRequest, NotEnoughSpace, NotFound

log = logging.getLogger(__name__)

MODES = ("copy", "move", "link", "reference")


class Importer:
    """Imports models into one store. Thread-safe; everything blocks."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store

    def run(self, path: str, model: str, mode: str, report: Report) -> StoredModel:
        """Imports the file at `path` (one of a split set: the whole set) as `model`; "" takes the file's name.

        Mode "copy" (the default) hard links where that is possible, else copies; "move" then removes the given files;
        "reference" leaves them where they lie; "link" hard links or, where that is not possible, references.
        report is called with "copying" or "hashing", bytes done and bytes in all; when it raises, nothing is left
        behind. Raises NotFound, AlreadyExists, InvalidRequest, InvalidModel, NotEnoughSpace, NotReady.
        """
        mode = mode or "copy"
        if mode not in MODES:
            raise InvalidRequest(f"mode is {mode!r}, modes are {', '.join(MODES)}")
        source = _source(path)
        model = check_id(model) if model else id_of(source.name)
        with self._store.claims.take(model):
            return self.take(source, model, mode, report, str(source))

    def take(self, source: Path, model: str, mode: str, report: Report, origin: str, sha256: str = "") -> StoredModel:
        """Like `run`, for a file that is there and a name that the caller holds. origin: noted as where it is from.
        sha256: what a single file must have. Raises DataLoss when it has another."""
        if mode not in MODES:
            raise InvalidRequest(f"mode is {mode!r}, modes are {', '.join(MODES)}")
        header = _read_header(source)
        sources = header.model.paths
        if mode == "move":
            self._check_movable(sources)
        if mode == "reference":
            self._check_outside(sources)
        self._check_free(model, sources if mode == "move" else ())
        with self._store.staging() as folder:
            files = _Transfer(sources, folder, mode, report, self._store.folder).run(stored_names(model, len(sources)))
            if sha256 and files[0].sha256 != sha256:
                raise DataLoss(f"{source} has the SHA-256 {files[0].sha256}, it should have {sha256}")
            brought = read_header(folder / files[0].name)  # what was brought in is sound too
            header_sha256 = brought.sha256 if any(file.reference for file in files) else ""
            imported_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            Manifest("gguf", tuple(files), origin, imported_at, header_sha256).save(folder)
            self._store.publish(folder, model)
        if mode == "move":
            _remove(sources)
        log.info("event=model_imported id=%s files=%d bytes=%d", model, len(files), header.model.size_bytes)
        return self._store.get(model)

    def _check_free(self, model: str, moved: Sequence[Path]) -> None:
        """Raises AlreadyExists for a name in use. Files put there by hand may be moved in under their own name."""
        existing = self._store.find(model)
        if existing is not None and not existing.imported:
            own = [existing.path(number).resolve() for number in range(len(existing.files))]
            if own == [path.resolve() for path in moved]:
                return
        self._store.check_free(model)

    def _check_outside(self, sources: Sequence[Path]) -> None:
        for path in sources:
            if path.resolve().is_relative_to(self._store.folder):
                raise InvalidRequest(f"{path} lies in the model store: there is nothing to reference")

    def _check_movable(self, sources: Sequence[Path]) -> None:
        for path in sources:
            real = path.resolve()
            if real.is_relative_to(self._store.folder) and real.parent != self._store.folder:
                raise InvalidRequest(f"{path} belongs to a model of the store: it can be copied, not moved")
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise InvalidRequest(f"{path} cannot be moved: its folder cannot be written; copy it instead")


class _Transfer:
    """Brings the bytes of one model's files into a folder, and hashes them on the way."""

    def __init__(self, sources: Sequence[Path], folder: Path, mode: str, report: Report, store: Path) -> None:
        self._store = store
        self._sources = [source.resolve() for source in sources]  # link(2) does not follow symbolic links
        self._before = [source.stat() for source in self._sources]
        self._sizes = [status.st_size for status in self._before]
        self._folder = folder
        self._mode = mode
        self._report = report
        self._done = 0
        self._phase = "hashing"

    def run(self, names: Sequence[str]) -> list[ManifestFile]:
        """Brings all files in, under these names."""
        files = []
        for number, name in enumerate(names):
            source, target = self._sources[number], self._folder / name
            sums, referenced = self._bring(number, source, target)
            before, after = self._before[number], source.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InvalidModel("the file changed while it was imported", source)
            reference = Reference(str(source), before.st_mtime_ns) if referenced else None
            files.append(ManifestFile(name, before.st_size, sums.sha256, sums.blocks, reference))
        return files

    def _bring(self, number: int, source: Path, target: Path) -> tuple[checksums.FileSums, bool]:
        """Sums of a file that was brought in, and whether it is a reference only."""
        own = self._mode != "reference" and (checksums.try_link(source, target) or checksums.try_clone(source, target))
        if own or self._mode in ("reference", "link"):
            if not own:
                self._refer(source, target)
            self._phase = "hashing"
            self._progress(0)
            return checksums.sums_of(target, self._progress), not own
        self._phase = "copying"
        self._check_space(number)
        self._progress(0)
        return checksums.copy_with_sums(source, target, self._progress), False

    def _refer(self, source: Path, target: Path) -> None:
        try:
            str(source).encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{str(source)!r} cannot be referenced: its name is not UTF-8") from None
        target.symlink_to(source)

    def _progress(self, nbytes: int) -> None:
        self._done += nbytes
        total = sum(self._sizes)
        if self._done > total:  # and might grow for ever
            raise InvalidModel("the file grows while it is imported", self._sources[0])
        self._report(self._phase, self._done, total)

    def _check_space(self, number: int) -> None:
        """Raises NotEnoughSpace unless the files from `number` on fit."""
        needed, free = sum(self._sizes[number:]), shutil.disk_usage(self._folder).free
        if needed > free:
            raise NotEnoughSpace(
                f"a copy needs {needed} bytes, the disk of the model store {self._store} has {free} bytes free: "
                f"{needed - free} are missing; make room"
            )


def _source(path: str) -> Path:
    """The file that is named. Raises NotFound, InvalidRequest."""
    source = Path(path)
    if not source.is_absolute() or "\0" in path:
        raise InvalidRequest(f"{path!r} must be an absolute path on the data worker's machine")
    try:
        status = source.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {source} on the data worker's machine") from None
    except OSError as error:
        raise InvalidRequest(f"{source} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise InvalidRequest(f"{source} is a folder: name the GGUF file in it")
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(f"{source} is not a file")
    return source


def _read_header(source: Path) -> ModelHeader:
    try:
        return read_header(source)
    except OSError as error:
        raise InvalidRequest(f"{error.filename or source} cannot be read: {error.strerror}") from None


def _remove(sources: Sequence[Path]) -> None:
    for source in sources:
        try:
            source.unlink()
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                log.warning("event=moved_file_left path=%s reason=%r", source, error.strerror)
