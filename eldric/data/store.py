"""A store of models in one folder, which other machines may mount.

    FOLDER/ID/         an imported model: ID.gguf (or the parts of a split set) and manifest.json
    FOLDER/*.gguf      models that somebody put there by hand; a split set counts as one
    FOLDER/.eldric/    imports in progress, downloads that go on when they are asked for again (partial/), what is being
                       removed, sums of files that were put there by hand, and of those that were found damaged

An import appears by one rename, so what is listed is whole. Everything here blocks: call it from a thread.
"""

import contextlib
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from eldric.data import checksums
from eldric.data.claims import Claims
from eldric.data.index import Index
from eldric.data.locks import locked
from eldric.data.model import StoredFile, StoredModel
from eldric.data.partials import Partials
from eldric.data.sums import Sums
from eldric.errors import AlreadyExists, DataLoss, EldricError, NotEnoughSpace, NotFound, NotReady
from eldric.nearest import known_names

log = logging.getLogger(__name__)

#: Called with what is being done, bytes done so far and bytes in all. May raise, which ends the work.
Report = Callable[[str, int, int], None]

#: What a disk that takes no more says.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Damaged blocks that a message names.
_NAMED_BLOCKS = 8


class ModelStore:
    """Lists, finds, verifies and removes models. Thread-safe; several processes may use one folder."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is missing. Raises NotReady when that is not possible."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder.resolve(strict=True)
        except OSError as error:
            raise NotReady(f"the model store {folder} cannot be used: {error.strerror}") from None
        own = self.folder / ".eldric"
        self._incoming, self._removed, self._lock_path = own / "incoming", own / "removed", own / "lock"
        self._sums, self._wrong_sums = Sums(own / "sums.json"), Sums(own / "wrong_sums.json")
        self._index = Index(self.folder, self._sums, self._wrong_sums)
        #: Names that imports of this process hold, and downloads that are not complete.
        self.claims, self.partials = Claims(), Partials(own / "partial")

    def list(self) -> list[StoredModel]:
        """All models by name, damaged ones too. Raises NotReady when the folder cannot be read."""
        return self._index.all()

    def find(self, model: str) -> StoredModel | None:
        """A model by name, or None. Raises InvalidRequest for what is no name."""
        return self._index.find(model)

    def get(self, model: str) -> StoredModel:
        """A model by name. Raises NotFound, InvalidRequest for what is no name."""
        found = self._index.find(model)
        if found is None:
            known = known_names(model, [each.id for each in self.list()])
            raise NotFound(f"the model store has no model {model!r}; {known}")
        return found

    def free_bytes(self) -> int:
        """What the disk has free. Raises NotReady when it cannot say."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError as error:
            raise NotReady(f"the model store {self.folder} cannot be used: {error.strerror}") from None

    def check_free(self, model: str) -> None:
        """Raises AlreadyExists for a name in use."""
        if self.find(model) is not None:
            raise AlreadyExists(f"the model store has a model {model!r}: remove it first, or give another name")

    def remove(self, model: str) -> None:
        """Removes a model and its files at once; who has them open reads on. Of one that is not complete, what has
        come goes. Raises NotFound, NotReady."""
        with self.write_errors():
            if self.find(model) is None and self.partials.remove(model):
                log.info("event=partial_download_removed id=%s", model)
                return
        found = self.get(model)
        with self.write_errors():
            for file in found.files:
                self._wrong_sums.drop(str(file.path))
            if found.imported:
                self._remove_folder(self.folder / model)
            else:
                for file in found.files:
                    (self.folder / file.path).unlink(missing_ok=True)
                    self._sums.drop(file.path.name)
        log.info("event=model_removed id=%s bytes=%d", model, found.size_bytes)

    def verify(self, model: str, report: Report) -> None:
        """Compares the sums of each file and of its blocks with those that were kept.

        A file that was put there by hand has none at first: then its sums are kept. One that differs is remembered, and
        its model is damaged for everybody, until the file changes or is found sound. Raises DataLoss, which names every
        file that differs and its damaged blocks, NotFound, NotReady.
        """
        found = self.get(model)
        if not found.files:
            raise found.error or DataLoss(f"{model} has no files")
        done, total = 0, found.size_bytes

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report("hashing", done, max(done, total))

        damage = [problem for file in found.files if (problem := self._damage(file, progress))]
        if damage:
            raise DataLoss(f"{model} is damaged: {'; '.join(damage)}")
        if error := self.get(model).error:  # what a check before this one found is mended by now
            raise error

    def clean(self) -> None:
        """Deletes what killed imports and removals left behind, unless another process is importing right now."""
        try:
            with locked(self._lock_path, shared=False):
                for left in [*_children(self._incoming), *_children(self._removed)]:
                    log.info("event=cleaned_up path=%s", left)
                    shutil.rmtree(left, ignore_errors=True)
                self.partials.clean()
        except FileNotFoundError:
            return  # nobody has imported anything here
        except OSError as error:
            log.info("event=clean_up_skipped reason=%r", str(error))

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's file system. It goes when the block ends, unless it was published."""
        with self.write_errors():
            self._incoming.mkdir(parents=True, exist_ok=True)
            with locked(self._lock_path, shared=True):
                folder = self._incoming / uuid.uuid4().hex
                folder.mkdir()
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)

    def publish(self, staged: Path, model: str) -> None:
        """Makes a staged folder the model's, in one step. Raises AlreadyExists when the name was taken meanwhile."""
        try:
            _sync_folder(staged)
            staged.rename(self.folder / model)
            _sync_folder(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise AlreadyExists(f"the model store has a model {model!r}, or another file of that name") from None
            raise

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Turns an OSError of a write to the store into the error that a caller understands."""
        try:
            yield
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> EldricError:
        if error.errno in _FULL:
            free = shutil.disk_usage(self.folder).free
            return NotEnoughSpace(f"{self.folder} is full: {error.strerror}, {free} bytes are free; make room")
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return NotReady(f"the model store {self.folder} cannot be written: {error.strerror}")
        return DataLoss(f"reading or writing files failed: {error}")

    def _damage(self, file: StoredFile, progress: checksums.Progress) -> str:
        path = self.folder / file.path
        try:
            status = path.stat()
            if file.sha256 and status.st_size != file.size_bytes:
                return f"{file.path} has {status.st_size} bytes, it had {file.size_bytes}"
            sums = checksums.sums_of(path, progress)
        except OSError as error:
            return f"{file.path} cannot be read: {error.strerror}"
        if not file.sha256:
            self._sums.put(file.path.name, status, sums)
        elif sums.sha256 == file.sha256:
            self._wrong_sums.drop(str(file.path))
        else:
            self._wrong_sums.put(str(file.path), status, sums)
            blocks = _named_blocks(file.sums.damaged_blocks(sums), status.st_size)
            return f"{file.path} has the SHA-256 {sums.sha256}, it had {file.sha256}{blocks}"
        return ""

    def _remove_folder(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()
            return
        target = self._removed / uuid.uuid4().hex
        try:
            self._removed.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        except FileNotFoundError:  # somebody else removed it just now
            return
        except OSError as error:
            if error.errno not in _FULL:
                raise
            target = folder  # a full disk has no room for its new name, and most of all then it should go
        shutil.rmtree(target, ignore_errors=True)


def _named_blocks(damaged: list[int], size_bytes: int) -> str:
    """Where the damage is, for people."""
    if not damaged:
        return ""
    ranges = [
        f"{block} (bytes {block * checksums.BLOCK_BYTES} to {min((block + 1) * checksums.BLOCK_BYTES, size_bytes) - 1})"
        for block in damaged[:_NAMED_BLOCKS]
    ]
    more = f" and {len(damaged) - _NAMED_BLOCKS} more" if len(damaged) > _NAMED_BLOCKS else ""
    return f": damaged is block {', '.join(ranges)}{more}"


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _sync_folder(folder: Path) -> None:
    """Has a folder's entries on the disk, where its file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
