"""Bytes of a stored model, by range."""

import os
import threading
from collections.abc import Iterable, Iterator

from eldric.data.model import StoredModel
from eldric.engine.shard import ByteRange, LayerRange, shard_of
from eldric.errors import DataLoss, InvalidRequest


def all_ranges(model: StoredModel) -> tuple[ByteRange, ...]:
    """All bytes of all files. Raises DataLoss for a damaged model."""
    sizes = model.sound_header.model.file_sizes
    return tuple(ByteRange(file, 0, size) for file, size in enumerate(sizes))


def header_range(model: StoredModel) -> tuple[ByteRange, ...]:
    """The bytes of the first file before tensor data. Raises DataLoss for a damaged model."""
    return (ByteRange(0, 0, model.sound_header.model.header_bytes),)


def layer_ranges(model: StoredModel, start: int, stop: int) -> tuple[ByteRange, ...]:
    """What a stage of the layers [start, stop) needs, exactly.

    Raises InvalidLayers, InvalidRequest when the model's layers are not known, DataLoss for a damaged model.
    """
    header = model.sound_header
    if header.spec is None:
        raise InvalidRequest(f"the layers of {model.id} are not known: {header.problem}")
    return shard_of(header.model, header.spec, LayerRange(start, stop)).ranges


def pieces(ranges: Iterable[ByteRange], most_bytes: int) -> Iterator[ByteRange]:
    """The same bytes in the same order, cut into pieces of at most `most_bytes`."""
    for part in ranges:
        for begin in range(0, part.length, most_bytes):
            yield ByteRange(part.file, part.offset + begin, min(most_bytes, part.length - begin))


class Reader:
    """Reads a model's files, which stay open until close: a model that is removed meanwhile can be read to its end.

    Thread-safe; close waits for a read that runs.
    """

    def __init__(self, model: StoredModel) -> None:
        """Opens all files. Raises DataLoss when one is gone or cannot be read."""
        self._model = model
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        try:
            for number in range(len(model.files)):
                self._descriptors.append(os.open(model.path(number), os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise DataLoss(f"{model.id}: {error.filename} cannot be read: {error.strerror}") from None

    def read(self, part: ByteRange) -> bytes:
        """The bytes of a range. Raises DataLoss when the file ends before, or cannot be read."""
        path = self._model.files[part.file].path
        try:
            with self._lock:
                data = os.pread(self._descriptors[part.file], part.length, part.offset)
        except OSError as error:
            raise DataLoss(f"{path} cannot be read at byte {part.offset}: {error.strerror}") from None
        if len(data) != part.length:
            raise DataLoss(f"{path} ends at byte {part.offset + len(data)}, it was longer")
        return data

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.pop())
