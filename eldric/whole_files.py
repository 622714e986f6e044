"""Files that are replaced whole: a reader, and the next start after a kill or a full disk, sees the old one or the new.

A draft lies beside the file that it will replace, as ".NAME.part".
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path


def replace(contents: Mapping[Path, bytes], *, secret: Collection[Path] = ()) -> None:
    """Replace files that belong together, the last one last: all their drafts are on the disk before.

    secret: those that only the owner may read. Raises OSError that names the file; then none was replaced.
    """
    drafts = {path: draft_of(path) for path in contents}
    try:
        for path, draft in drafts.items():
            with naming(path):
                _write(draft, contents[path], 0o600 if path in secret else 0o644)
    except BaseException:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        raise
    for path, draft in drafts.items():
        os.replace(draft, path)


def draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the errors of reads and writes name the file, as those of opening it do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write(draft: Path, content: bytes, mode: int) -> None:
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
