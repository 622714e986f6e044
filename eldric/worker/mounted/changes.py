"""What became of a model's files since a stage was loaded from them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which file a path named, and what it was like: by size and time of change, which every write to it moves."""

    path: Path
    device: int
    inode: int
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Raises OSError."""
        status = os.stat(path)
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Changes:
    """in_place: what was written into the very file that is mapped: its bytes are not those that were loaded any more.
    replaced: what has another file in its place, or none: the stage still has the one that it opened."""

    in_place: str = ""
    replaced: str = ""


def changes(loaded: Sequence[FileStamp], now: Mapping[Path, FileStamp | None]) -> Changes:
    """What happened to the files, for people. now: by path, None where nothing is there; those not asked are left out.

    Another file that is like the first in all that is known of it counts as the same.
    """
    in_place = replaced = ""
    for before in loaded:
        if before.path not in now:
            continue
        found = now[before.path]
        if found is None:
            replaced = replaced or f"{before.path} was removed"
        elif (found.size_bytes, found.changed_ns) == (before.size_bytes, before.changed_ns):
            continue
        elif (found.device, found.inode) != (before.device, before.inode):
            replaced = replaced or f"{before.path} was replaced by another file"
        else:
            sizes = f" from {before.size_bytes} to {found.size_bytes} bytes" * (found.size_bytes != before.size_bytes)
            in_place = in_place or f"{before.path} was changed in place{sizes} while this stage mapped it"
    return Changes(in_place, replaced)


def stamps_of(paths: Iterable[Path]) -> dict[Path, FileStamp | None]:
    """The files now. One that cannot be looked at is left out."""
    found: dict[Path, FileStamp | None] = {}
    for path in paths:
        try:
            found[path] = FileStamp.of(path)
        except (FileNotFoundError, NotADirectoryError):
            found[path] = None
        except OSError:
            continue
    return found
