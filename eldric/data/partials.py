"""Downloads that are not complete, kept so that the next try goes on: one folder for each model.

ID/ID.gguf      what has come (or the parts of a split set)
ID/pull.json    what it is going to be: size and SHA-256 of each file
ID/sums.json    sums of the files that are complete
ID/lock         held by the process that downloads
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from eldric.data.locks import NO_LOCKS, locked
from eldric.data.names import stored_names
from eldric.data.remote import Remote
from eldric.data.sums import Sums
from eldric.errors import AlreadyExists, EldricError, NotReady

log = logging.getLogger(__name__)

#: What nobody asked for again for so long is deleted when a data worker starts, in seconds.
KEPT_S = 14 * 86400.0

_PLAN, _SUMS, _LOCK = "pull.json", "sums.json", "lock"
_MAX_PLAN_BYTES = 1 << 20


class Partials:
    """The partial downloads of one store. Raises OSError where the store cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, model: str, remote: Remote) -> Iterator[Path]:
        """The folder in which a model grows, with what an earlier try brought of the very same files.

        Raises AlreadyExists when another process downloads the model.
        """
        folder = self._folder / model
        if folder.is_symlink():  # nobody here made it
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, AlreadyExists(f"{model!r} is being pulled by another data worker right now")):
            _begin(folder, _plan(remote))
            yield folder

    def kept_bytes(self, model: str, remote: Remote) -> int:
        """How much of these files an earlier try brought, as far as sizes tell."""
        folder = self._folder / model
        if not _is_planned(folder, _plan(remote)):
            return 0
        kept = 0
        for file, name in zip(remote.files, stored_names(model, len(remote.files)), strict=True):
            with contextlib.suppress(OSError):
                kept += min((folder / name).stat().st_size, file.size_bytes)
        return kept

    def sums(self, folder: Path) -> Sums:
        """Sums of the files of a folder that are complete."""
        return Sums(folder / _SUMS)

    def finish(self, folder: Path) -> None:
        """Removes from a folder, which became a model's, what only the download needed."""
        for name in (_PLAN, _SUMS, _LOCK):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)

    def remove(self, model: str) -> bool:
        """Gives up a partial download; False where there is none. Raises NotReady while it is going on."""
        folder = self._folder / model
        if folder.is_symlink() or not folder.is_dir():
            return False
        with _alone(folder, NotReady(f"{model!r} is being pulled right now: end that first")):
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def discard(self, folder: Path) -> None:
        """Deletes what came, by who holds it."""
        shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        """Deletes what has not changed for KEPT_S."""
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > KEPT_S:
                    log.info("event=partial_download_deleted id=%s", folder.name)
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path, refusal: EldricError) -> Iterator[None]:
    """Holds a download's lock, where the file system has locks. Raises `refusal` when another process holds it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK, shared=False))
        except BlockingIOError:
            raise refusal from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _plan(remote: Remote) -> list[list[object]]:
    """What tells one download from another."""
    return [[file.size_bytes, file.sums.sha256] for file in remote.files]


def _is_planned(folder: Path, plan: list[list[object]]) -> bool:
    with contextlib.suppress(OSError, ValueError, RecursionError), (folder / _PLAN).open("rb") as file:
        return bool(json.loads(file.read(_MAX_PLAN_BYTES)) == plan)
    return False


def _begin(folder: Path, plan: list[list[object]]) -> None:
    """Empties the folder of a download of other files, and notes which these are."""
    if _is_planned(folder, plan):
        return
    for path in folder.iterdir():
        if path.name != _LOCK:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    (folder / _PLAN).write_text(json.dumps(plan))
