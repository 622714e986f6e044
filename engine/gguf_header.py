"""Parses the header of one GGUF file: key-value pairs left where they lie, and tensor infos.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Nothing is
allocated by what the file claims: every count and length is held against the bytes that are there first.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from eldric.engine.errors import InvalidModel
from eldric.engine.gguf_strings import LENGTH, BrokenString, Buffer, skip_string, skip_strings
from eldric.engine.tensor_types import TensorType
from eldric.engine.tensors import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 1 << 27  # ten times that of the largest vocabularies; bounds the time that a hostile file costs
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less its terminator
MAX_DIMS = 4  # GGML_MAX_DIMS


class ValueType(IntEnum):
    """The type of a value, or of an array's elements."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def layout(self) -> str:
        """The scalar's format for struct and numpy; empty for STRING and ARRAY."""
        return _LAYOUTS[self]

    @property
    def nbytes(self) -> int:
        """Bytes of a scalar; 0 for STRING and ARRAY."""
        return struct.calcsize(_LAYOUTS[self])


_LAYOUTS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<B", "", "", "<Q", "<q", "<d")


class Entry(NamedTuple):
    """Where a value lies. length: None for a scalar, the number of elements of an array."""

    type: ValueType  # the value's, or the elements'
    offset: int  # of the scalar, of a string's length field, or of an array's first element
    length: int | None


@dataclass(frozen=True, slots=True)
class Header:
    """What one file's header says. data_start: where tensor data begins; without tensors, where the header ends."""

    entries: dict[str, Entry]
    tensors: dict[str, TensorInfo]
    data_start: int


class _Reader:
    """Takes fields off a buffer. Every failure names the field and its byte."""

    __slots__ = ("_why_short", "buffer", "end", "name", "offset")

    def __init__(self, buffer: Buffer, name: str, size_bytes: int) -> None:
        self.buffer, self.name, self.offset = buffer, name, 0
        self.end = min(len(buffer), size_bytes, MAX_HEADER_BYTES)
        if self.end == size_bytes:
            self._why_short = "the file ends"
        elif self.end == MAX_HEADER_BYTES:
            self._why_short = f"the header is longer than {MAX_HEADER_BYTES} bytes: it ends"
        else:
            self._why_short = f"only {self.end} bytes of the header are here: they end"

    def error(self, problem: str, offset: int) -> InvalidModel:
        return InvalidModel(problem, self.name, offset)

    def short(self, what: str, offset: int) -> InvalidModel:
        return self.error(f"{self._why_short} inside {what}", offset)

    def skip(self, nbytes: int, what: str) -> int:
        """Pass over nbytes; return where they began."""
        start = self.offset
        if nbytes > self.end - start:
            raise self.short(what, start)
        self.offset = start + nbytes
        return start

    def u32(self, what: str) -> int:
        value: int = struct.unpack_from("<I", self.buffer, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = LENGTH.unpack_from(self.buffer, self.skip(8, what))[0]
        return value

    def text(self, limit: int, what: str) -> str:
        start = self.offset
        length = self.u64(what)
        if not 0 < length <= limit:
            raise self.error(f"{what} is {length} bytes long, expected 1 to {limit}", start)
        at = self.skip(length, what)
        try:
            return self.buffer[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8", at + error.start) from None

    def value_type(self, what: str) -> ValueType:
        number = self.u32(what)
        try:
            return ValueType(number)
        except ValueError:
            raise self.error(f"{what} is {number}, which names no type", self.offset - 4) from None


def parse_header(buffer: Buffer, name: str, size_bytes: int, file: int = 0) -> Header:
    """Parse the header at the start of `buffer`, which holds a file of `size_bytes` bytes or the first part of it.

    name: the file's, for messages. file: its index in the split set, put into the tensor infos.
    Raises InvalidModel, naming the byte.
    """
    reader = _Reader(buffer, name, size_bytes)
    tensor_count, key_count = _counts(reader)
    entries: dict[str, Entry] = {}
    for index in range(key_count):
        start = reader.offset
        key = reader.text(MAX_KEY_BYTES, f"key {index}")
        if key in entries:
            raise reader.error(f"key {key} is there twice", start)
        entries[key] = _entry(reader, key)
    alignment = _alignment(reader, entries)
    tensors: dict[str, TensorInfo] = {}
    starts = []
    for index in range(tensor_count):
        starts.append(reader.offset)
        info = _tensor(reader, index, alignment, file)
        if info.name in tensors:
            raise reader.error(f"tensor {info.name} is there twice", starts[-1])
        tensors[info.name] = info
    if not tensors:
        return Header(entries, {}, reader.offset)
    data_start = -(-reader.offset // alignment) * alignment
    placed = {}
    for info, start in zip(tensors.values(), starts, strict=True):
        placed[info.name] = _placed(reader, info, data_start, size_bytes, start)
    if data_start > reader.end:
        raise reader.short("the padding before tensor data", reader.offset)
    return Header(entries, placed, data_start)


def _counts(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return how many tensors and keys there are."""
    magic = reader.buffer[reader.skip(4, "the magic number") : 4]
    if magic != MAGIC:
        raise reader.error(f"not a GGUF file: it begins with {magic!r}", 0)
    version = reader.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise reader.error("a big-endian GGUF file: this engine reads little-endian ones", 4)
    if version not in VERSIONS:
        raise reader.error(f"GGUF version {version}: this engine reads versions 2 and 3", 4)
    tensor_count, key_count = reader.u64("the number of tensors"), reader.u64("the number of keys")
    # A tensor info takes 33 bytes at least, a key 14.
    for offset, what, count, limit, nbytes in (
        (8, "tensors", tensor_count, MAX_TENSORS, 33),
        (16, "keys", key_count, MAX_KEYS, 14),
    ):
        if count > limit:
            raise reader.error(f"{count} {what}: at most {limit} are read", offset)
        if count * nbytes > reader.end - reader.offset:
            raise reader.short(f"the {count} {what} that it claims", offset)
    return tensor_count, key_count


def _entry(reader: _Reader, key: str) -> Entry:
    """Pass over a value; note where it lies."""
    kind = reader.value_type(f"the type of {key}")
    if kind is ValueType.STRING:
        start = reader.offset
        try:
            reader.offset = skip_string(reader.buffer, start, reader.end)
        except BrokenString as broken:
            raise reader.short(key, broken.offset) from None
        return Entry(kind, start, None)
    if kind is not ValueType.ARRAY:
        return Entry(kind, reader.skip(kind.nbytes, key), None)
    kind = reader.value_type(f"the element type of {key}")
    if kind is ValueType.ARRAY:
        raise reader.error(f"{key} is an array of arrays, which no model uses", reader.offset - 4)
    count = reader.u64(f"the length of {key}")
    start = reader.offset
    if count * (kind.nbytes or 8) > reader.end - start:
        raise reader.short(f"{key}, an array of {count} elements", start - 8)
    if kind is not ValueType.STRING:
        reader.skip(count * kind.nbytes, key)
        return Entry(kind, start, count)
    try:
        reader.offset = skip_strings(reader.buffer, start, count, reader.end)
    except BrokenString as broken:
        raise reader.short(f"a string of {key}", broken.offset) from None
    return Entry(kind, start, count)


def _alignment(reader: _Reader, entries: dict[str, Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type is not ValueType.UINT32 or entry.length is not None:
        raise reader.error("general.alignment is not a 32-bit unsigned integer", entry.offset)
    value: int = struct.unpack_from("<I", reader.buffer, entry.offset)[0]
    if value < 8 or value & (value - 1):
        raise reader.error(f"general.alignment is {value}, expected a power of two from 8 on", entry.offset)
    return value


def _tensor(reader: _Reader, index: int, alignment: int, file: int) -> TensorInfo:
    """Read one tensor info; its offset is still relative to the data's start."""
    name = reader.text(MAX_NAME_BYTES, f"the name of tensor {index}")
    if not name.isprintable():
        raise reader.error(f"the name of tensor {index}, {name!r}, is not printable", reader.offset - len(name))
    what = f"the info of tensor {name}"
    dims = reader.u32(what)
    if not 1 <= dims <= MAX_DIMS:
        raise reader.error(f"tensor {name} has {dims} dimensions, expected 1 to {MAX_DIMS}", reader.offset - 4)
    shape_at = reader.skip(8 * dims, what)
    shape: tuple[int, ...] = struct.unpack_from(f"<{dims}q", reader.buffer, shape_at)
    number = reader.u32(what)
    try:
        kind = TensorType(number)
    except ValueError:
        raise reader.error(f"tensor {name} is of unknown type {number}", reader.offset - 4) from None
    if min(shape) < 1:
        raise reader.error(f"tensor {name} has the shape {list(shape)}", shape_at)
    if shape[0] % kind.block_size:
        raise reader.error(
            f"tensor {name} has rows of {shape[0]} values, not a multiple of {kind.name}'s {kind.block_size}",
            shape_at,
        )
    nbytes = kind.row_bytes(shape[0])
    for size in shape[1:]:
        nbytes *= size
    offset = reader.u64(what)
    if offset % alignment:
        raise reader.error(f"tensor {name} is not aligned to {alignment} bytes", reader.offset - 8)
    return TensorInfo(name, kind, shape, file, offset, nbytes)


def _placed(reader: _Reader, info: TensorInfo, data_start: int, size_bytes: int, start: int) -> TensorInfo:
    """The info with its offset in the file, after a check that the tensor lies in there."""
    offset = data_start + info.offset
    if offset + info.nbytes > size_bytes:
        raise reader.error(
            f"tensor {info.name} ends at byte {offset + info.nbytes}, but the file has {size_bytes}",
            start,
        )
    return TensorInfo(info.name, info.type, info.shape, info.file, offset, info.nbytes)
