"""A model that lies elsewhere, and is fetched over HTTP."""

from dataclasses import dataclass

from eldric.data.checksums import FileSums

#: No file is larger than this; whoever announces more is not believed.
MAX_FILE_BYTES = 1 << 44
MAX_FILES = 1000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file. name: at its source, for people. sums: what it must have, of its blocks only where the source says."""

    name: str
    url: str
    size_bytes: int
    sums: FileSums


@dataclass(frozen=True, slots=True)
class Remote:
    """A model, or a split set in order. uri: in full. model: its name if nobody gives another.

    problem: why it cannot be deployed, as far as its source tells.
    """

    uri: str
    model: str
    quantization: str
    files: tuple[RemoteFile, ...]
    problem: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)
