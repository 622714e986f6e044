"""What a store knows of a model besides its files: a small JSON document in the model's folder, written last."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from eldric.data.checksums import BLOCK_BYTES, FileSums, blocks_of

NAME = "manifest.json"
VERSION = 1

#: Enough for the block sums of 800 GB.
_MAX_BYTES = 1 << 26
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenManifest(ValueError):
    """A manifest that cannot be used. Says why."""


class UnknownVersion(BrokenManifest):
    """A manifest that another version of this program wrote."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A file that stays where it lies; its name in the model's folder is a link to it.

    path: absolute and without links. modified_ns: its time of change at import.
    """

    path: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model. name: in the model's folder. sha256, and those of its blocks: lower-case hex, at import.

    blocks is empty in a manifest that was written before there were any. reference: None for a file of the store's own.
    """

    name: str
    size_bytes: int
    sha256: str
    blocks: tuple[str, ...] = ()
    reference: Reference | None = None

    @property
    def sums(self) -> FileSums:
        return FileSums(self.sha256, self.blocks)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model of a store. source: the path or URI that it was imported from. imported_at: ISO 8601, UTC.

    header_sha256: of a model that is served by reference, what tells its header from another; else empty.
    """

    format: str
    files: tuple[ManifestFile, ...]
    source: str
    imported_at: str
    header_sha256: str = ""

    def save(self, folder: Path) -> None:
        """Writes the manifest atomically and durably. Raises OSError."""
        path, draft = folder / NAME, folder / f".{NAME}.tmp"
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            document = {"version": VERSION, "block_bytes": BLOCK_BYTES, **asdict(self)}
            json.dump(document, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the manifest of a model's folder.

        Raises UnknownVersion, BrokenManifest, OSError (FileNotFoundError where there is none).
        """
        with (folder / NAME).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise BrokenManifest(f"its manifest is longer than {_MAX_BYTES} bytes")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BrokenManifest(f"its manifest is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise BrokenManifest("its manifest is not a JSON object")
        version = document.get("version")
        if version != VERSION:
            raise UnknownVersion(f"its manifest is of version {version!r:.40}, this program reads version {VERSION}")
        files = document.get("files")
        if not isinstance(files, list) or not files:
            raise BrokenManifest("its manifest names no files")
        return cls(
            format=_text(document, "format"),
            files=tuple(_file(entry, document.get("block_bytes")) for entry in files),
            source=_text(document, "source"),
            imported_at=_text(document, "imported_at"),
            header_sha256=_text({"header_sha256": "", **document}, "header_sha256"),
        )


def _file(entry: Any, block_bytes: Any) -> ManifestFile:
    if not isinstance(entry, dict):
        raise BrokenManifest("an entry of its manifest's files is not an object")
    name, size, sha256 = _text(entry, "name"), entry.get("size_bytes"), _text(entry, "sha256")
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise BrokenManifest(f"its manifest names the file {name[:200]!r}, which is no plain file name")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BrokenManifest(f"its manifest gives {name} the size {size!r:.40}")
    if not _SHA256.fullmatch(sha256):
        raise BrokenManifest(f"its manifest gives {name} a SHA-256 that is none")
    blocks = _blocks(entry.get("blocks", []), name, size) if block_bytes == BLOCK_BYTES else ()
    return ManifestFile(name, size, sha256, blocks, _reference(entry.get("reference"), name))


def _reference(entry: Any, name: str) -> Reference | None:
    if entry is None:
        return None
    path, modified_ns = (entry.get("path"), entry.get("modified_ns")) if isinstance(entry, dict) else (None, None)
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path or type(modified_ns) is not int:
        raise BrokenManifest(f"its manifest does not say where {name} lies")
    return Reference(path, modified_ns)


def _blocks(blocks: Any, name: str, size: int) -> tuple[str, ...]:
    if not blocks:
        return ()
    if not isinstance(blocks, list) or len(blocks) != blocks_of(size):
        raise BrokenManifest(f"its manifest does not give {name} a SHA-256 for each of its {blocks_of(size)} blocks")
    if not all(isinstance(block, str) and _SHA256.fullmatch(block) for block in blocks):
        raise BrokenManifest(f"its manifest gives a block of {name} a SHA-256 that is none")
    return tuple(blocks)


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise BrokenManifest(f"its manifest has no text {key!r}")
    return value
