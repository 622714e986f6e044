"""Model files in the GGUF format: tensor infos and metadata, read from the header without touching tensor data."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from eldric.engine.metadata import Metadata
from eldric.engine.tensors import TensorInfo


class ModelFile:
    """One model: a GGUF file, or a split set named `…-00001-of-0000N.gguf`, with the headers of all parts read."""

    paths: tuple[Path, ...]
    file_sizes: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Metadata
    size_bytes: int
    header_bytes: int

    @classmethod
    def open(cls, path: Path | str) -> Self:
        raise NotImplementedError

    @classmethod
    def from_header(cls, data: bytes, name: str, size_bytes: int) -> Self:
        raise NotImplementedError

    def header_sha256(self) -> str:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
