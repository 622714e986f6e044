"""The mounts that a worker reads models from: found, made, and held against the file that was planned."""

import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eldric.engine.gguf import ModelFile
from eldric.errors import EldricError, InvalidRequest, NotFound, NotReady
from eldric.nfs.address import NFS_PORT, NfsAddress
from eldric.nfs.mountinfo import Mount, folders_of, mounts, remote_mount
from eldric.nfs.mounting import OwnMounts
from eldric.v1 import stage_pb2
from eldric.worker.mounted.process import Silent, look
from eldric.worker.source import open_model, path_in

log = logging.getLogger(__name__)

#: Longest look at a model's files on a mount, in seconds.
LOOK_S = 5.0
#: Of a file whose store does not say how long its header is.
_SOME_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MountedFile:
    """A file on a mount that may hang."""

    mount: Mount
    path: Path


class Mounts:
    """Of one worker. Its methods block, each for a bounded time, and are for threads of their own."""

    def __init__(self, own: Path, models_dir: Path | None = None) -> None:
        """own: the folder for mounts that the worker makes itself. models_dir: where the operator mounted the store."""
        self._own = OwnMounts(own)
        self._models_dir = models_dir
        self._mounting = threading.Lock()
        #: What is wrong with mounts that do not answer, by the folder that they are mounted on. MountWatch writes it.
        self.problems: dict[str, str] = {}

    def open(self, source: stage_pb2.ModelSource) -> tuple[ModelFile, MountedFile | None]:
        """Open the file that was planned, wherever it is mounted. The second value is None for local files.

        Raises NotFound when no mount shows it, NotReady when another file is in its place or a mount does not answer,
        InvalidModel, InvalidRequest.
        """
        problems: list[EldricError] = []
        for folder in self._folders(source, problems):
            try:
                mount = self._check(folder or Path(source.folder), source)
                model = open_model(source, folder)
                return model, MountedFile(mount, model.paths[0]) if mount is not None else None
            except (NotFound, NotReady, InvalidRequest) as error:
                problems.append(error)
        raise next((each for each in problems if not isinstance(each, NotFound)), problems[0])

    def close(self) -> None:
        """Takes the worker's own mounts away."""
        with self._mounting:
            self._own.close()

    def _folders(self, source: stage_pb2.ModelSource, problems: list[EldricError]) -> Iterator[Path | None]:
        """Where the store may be, one after the other; None: in its own folder. Mounting comes last."""
        yield self._models_dir
        if self._models_dir is not None:
            return
        exports = list(_exports(source))
        seen = mounts() if exports else []
        for export in exports:
            yield from folders_of(export, seen)
        for export in exports:
            try:
                with self._mounting:
                    folder = self._own.mount(export)
            except EldricError as error:
                log.info("event=not_mounted export=%s reason=%r", export, error.message)
                problems.append(NotReady(error.message))
            else:
                yield folder

    def _check(self, folder: Path, source: stage_pb2.ModelSource) -> Mount | None:
        """Look at the files from a process that may hang, if they are not local: their headers are here afterwards."""
        mount = remote_mount(folder)
        if mount is None:
            return None
        if mount.point in self.problems:
            raise NotReady(self.problems[mount.point])
        files = [(path_in(folder, each.path), each.header_bytes or _SOME_HEADER_BYTES) for each in source.files]
        try:
            look(files, LOOK_S)
        except Silent:
            raise NotReady(f"the mount {mount.point} ({mount.source}) does not answer within {LOOK_S:.0f} s") from None
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            kind = NotFound if missing else NotReady
            raise kind(f"{source.files[0].path} cannot be read from {folder}: {error.strerror}") from error
        return mount


def _exports(source: stage_pb2.ModelSource) -> Iterator[NfsAddress]:
    for given in source.exports:
        try:
            yield NfsAddress(given.host, given.path, given.port or NFS_PORT)
        except InvalidRequest as error:
            log.warning("event=export_ignored model=%s reason=%r", source.model, error.message)
