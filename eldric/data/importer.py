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
from eldric.data.manifest import Manifest, ManifestFile
from eldric.data.model import StoredModel
from eldric.data.names import check_id, id_of, stored_names
from eldric.data.store import ModelStore, Report
from eldric.engine.errors import InvalidModel
from eldric.errors import AlreadyExists, InvalidRequest, NotEnoughSpace, NotFound

log = logging.getLogger(__name__)

MODES = ("copy", "move")


class Importer:
    """Imports models into one store. Thread-safe; everything blocks."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store

    def run(self, path: str, model: str, mode: str, report: Report) -> StoredModel:
        """Imports the file at `path` (one of a split set: the whole set) as `model`; "" takes the file's name.

        Hard links where that is possible, else copies; mode "move" then removes the given files. report is called
        with "copying" or "hashing", bytes done and bytes in all; when it raises, nothing is left behind.
        Raises NotFound, AlreadyExists, InvalidRequest, InvalidModel, NotEnoughSpace, NotReady.
        """
        mode = mode or "copy"
        if mode not in MODES:
            raise InvalidRequest(f"mode is {mode!r}, modes are {' and '.join(MODES)}")
        source = _source(path)
        header = _read_header(source)
        model = check_id(model) if model else id_of(source.name)
        sources = header.model.paths
        if mode == "move":
            self._check_movable(sources)
        with self._store.claim(model):
            self._check_free(model, sources if mode == "move" else ())
            with self._store.staging() as folder:
                files = _Transfer(sources, folder, report).run(stored_names(model, len(sources)))
                read_header(folder / files[0].name)  # what was brought in is sound too
                imported_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                Manifest("gguf", tuple(files), str(source), imported_at).save(folder)
                self._store.publish(folder, model)
        if mode == "move":
            _remove(sources)
        log.info("event=model_imported id=%s files=%d bytes=%d", model, len(files), header.model.size_bytes)
        return self._store.get(model)

    def _check_free(self, model: str, moved: Sequence[Path]) -> None:
        """Raises AlreadyExists for a name in use. Files put there by hand may be moved in under their own name."""
        existing = self._store.find(model)
        if existing is None:
            return
        own = [existing.path(number).resolve() for number in range(len(existing.files))]
        if existing.imported or own != [path.resolve() for path in moved]:
            raise AlreadyExists(f"the model store has a model {model!r}: remove it first, or give another name")

    def _check_movable(self, sources: Sequence[Path]) -> None:
        for path in sources:
            real = path.resolve()
            if real.is_relative_to(self._store.folder) and real.parent != self._store.folder:
                raise InvalidRequest(f"{path} belongs to a model of the store: it can be copied, not moved")
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise InvalidRequest(f"{path} cannot be moved: its folder cannot be written; copy it instead")


class _Transfer:
    """Brings the bytes of one model's files into a folder, and hashes them on the way."""

    def __init__(self, sources: Sequence[Path], folder: Path, report: Report) -> None:
        self._sources = [source.resolve() for source in sources]  # link(2) does not follow symbolic links
        self._before = [source.stat() for source in self._sources]
        self._sizes = [status.st_size for status in self._before]
        self._folder = folder
        self._report = report
        self._done = 0
        self._phase = "hashing"

    def run(self, names: Sequence[str]) -> list[ManifestFile]:
        """Brings all files in, under these names."""
        files = []
        for number, name in enumerate(names):
            source, target = self._sources[number], self._folder / name
            sums = self._bring(number, source, target)
            before, after = self._before[number], source.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InvalidModel("the file changed while it was imported", source)
            files.append(ManifestFile(name, before.st_size, sums.sha256, sums.blocks))
        return files

    def _bring(self, number: int, source: Path, target: Path) -> checksums.FileSums:
        if checksums.try_link(source, target) or checksums.try_clone(source, target):
            self._phase = "hashing"
            self._progress(0)
            return checksums.sums_of(target, self._progress)
        self._phase = "copying"
        self._check_space(number)
        self._progress(0)
        return checksums.copy_with_sums(source, target, self._progress)

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
                f"a copy needs {needed} bytes, the disk of the model store has {free} bytes free: "
                f"{needed - free} are missing"
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
