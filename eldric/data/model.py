"""One model of a store, as it was found in the folder."""

from dataclasses import dataclass
from pathlib import Path

from eldric.data.checksums import FileSums
from eldric.data.header import ModelHeader
from eldric.errors import DataLoss, EldricError, NotFound


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file. path: below the store's folder. sums: empty when not known yet."""

    path: Path
    size_bytes: int
    sums: FileSums

    @property
    def sha256(self) -> str:
        return self.sums.sha256


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model. Either header or error is None: an error says why the model cannot be used.

    folder: the store's. imported: it lies in a folder of its own with a manifest; else somebody put the files there.
    origin: the path or URI that it was imported from.
    """

    id: str
    folder: Path
    files: tuple[StoredFile, ...]
    imported: bool
    header: ModelHeader | None
    error: EldricError | None
    origin: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def problem(self) -> str:
        """Why it cannot be deployed; empty when it can."""
        if self.header is None:
            return str(self.error)
        return self.header.problem

    @property
    def sound_header(self) -> ModelHeader:
        """Its header. Raises DataLoss for a damaged model, NotReady for one of another version of this program."""
        if self.header is None:
            raise self.error or DataLoss(f"{self.id} is damaged")
        return self.header

    def path(self, file: int) -> Path:
        """Where a file lies. Raises NotFound for a number that it does not have."""
        if not 0 <= file < len(self.files):
            raise NotFound(f"{self.id} has no file {file}: it has {len(self.files)}, counted from 0")
        return self.folder / self.files[file].path
