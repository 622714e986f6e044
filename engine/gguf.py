"""Model files in the GGUF format: metadata and tensor infos, read without touching tensor data."""

import hashlib
import mmap
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from eldric.engine.errors import InvalidModel
from eldric.engine.gguf_header import Header, parse_header
from eldric.engine.gguf_strings import Buffer
from eldric.engine.metadata import Metadata
from eldric.engine.tensors import TensorInfo

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class ModelFile:
    """One model: a GGUF file, or a split set named `…-00001-of-0000N.gguf`, with the headers of all parts.

    paths, file_sizes: of the files in order; TensorInfo.file is an index into them.
    metadata: the first file's. header_bytes: all bytes of the first file before its tensor data.
    The first file stays mapped until close, because metadata is decoded from it when asked for.
    """

    __slots__ = ("_buffer", "file_sizes", "header_bytes", "metadata", "paths", "size_bytes", "tensors")

    def __init__(
        self, paths: Sequence[Path], file_sizes: Sequence[int], headers: Sequence[Header], buffer: Buffer
    ) -> None:
        self.paths = tuple(paths)
        self.file_sizes = tuple(file_sizes)
        self.size_bytes = sum(file_sizes)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_joined(paths, headers))
        self.metadata = Metadata(buffer, headers[0].entries, str(paths[0]))
        self.header_bytes = headers[0].data_start
        self._buffer = buffer

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a model file; of a split set, any part may be named.

        Raises InvalidModel for a damaged file, a missing part or a foreign one; OSError if `path` cannot be read.
        """
        path = Path(path)
        paths = part_paths(path)
        path.stat()  # what was named and is not there is no damaged model
        first = _mapped(paths[0])
        try:
            headers, sizes = [_part_header(first, paths, 0)], [len(first)]
            for file in range(1, len(paths)):
                with _mapped(paths[file]) as mapping:
                    headers.append(_part_header(mapping, paths, file))
                    sizes.append(len(mapping))
            model = cls(paths, sizes, headers, first)
            expected = model.metadata.get_int("split.tensors.count", len(model.tensors))
            if expected != len(model.tensors):
                raise InvalidModel(f"the split set has {len(model.tensors)} tensors, expected {expected}", path)
        except BaseException:
            first.close()
            raise
        return model

    @classmethod
    def from_header(cls, data: bytes, name: str, size_bytes: int) -> Self:
        """Make a model file of its first `header_bytes` bytes, or more, where the file itself is not at hand.

        name: for messages. size_bytes: the whole file's. Of a split set's first file this gives all metadata,
        but only that file's tensors. Raises InvalidModel.
        """
        return cls([Path(name)], [size_bytes], [parse_header(data, name, size_bytes)], data)

    def header_sha256(self) -> str:
        """SHA-256 of the first file's header, in lower-case hex: do two nodes see the same model?"""
        return hashlib.sha256(self._buffer[: self.header_bytes]).hexdigest()

    def close(self) -> None:
        """Unmap the first file. Metadata cannot be read any more; tensor infos can."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def part_paths(path: Path) -> tuple[Path, ...]:
    """The files of the split set that `path` belongs to by its name, in order; `path` alone if to none.

    Whether they exist is not looked at. Raises InvalidModel for part 0 or one past the last.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise InvalidModel(f"there is no part {number} of {count}", path)
    return tuple(path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1))


def _mapped(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InvalidModel("this part of the split set is missing", path) from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel("not a file", path)
    if not status.st_size:
        raise InvalidModel("the file is empty", path, 0)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _part_header(mapping: mmap.mmap, paths: Sequence[Path], file: int) -> Header:
    """Parse one part's header and check that it says what its name says."""
    path = paths[file]
    header = parse_header(mapping, str(path), len(mapping), file)
    metadata = Metadata(mapping, header.entries, str(path))
    count, number = metadata.get_int("split.count", 1), metadata.get_int("split.no", 0) + 1
    if (count, number) == (len(paths), file + 1) or (count <= 1 and len(paths) == 1):
        return header
    if len(paths) == 1:
        raise InvalidModel(
            f"part {number} of {count} of a split set, but not named …-{number:05}-of-{count:05}.gguf", path
        )
    raise InvalidModel(f"named as part {file + 1} of {len(paths)}, but it is part {number} of {count}", path)


def _joined(paths: Sequence[Path], headers: Sequence[Header]) -> dict[str, TensorInfo]:
    tensors = dict(headers[0].tensors)
    for path, header in zip(paths[1:], headers[1:], strict=True):
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise InvalidModel(f"tensor {min(twice)} is in an earlier part too", path)
        tensors.update(header.tensors)
    return tensors
