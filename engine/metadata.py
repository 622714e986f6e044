"""A GGUF file's key-value pairs, decoded when they are asked for."""

import struct
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import InvalidModel
from eldric.engine.gguf_header import Entry, ValueType
from eldric.engine.gguf_strings import LENGTH, Buffer

Default = TypeVar("Default")
Value = bool | int | float | str | list[str] | NDArray[Any]

_FLOATS = frozenset({ValueType.FLOAT32, ValueType.FLOAT64})
_BOOLS = frozenset({ValueType.BOOL})
_STRINGS = frozenset({ValueType.STRING})
_INTEGERS = frozenset(ValueType) - _FLOATS - _BOOLS - _STRINGS - {ValueType.ARRAY}


class Metadata(Mapping[str, Value]):
    """Mapping of key to value. Scalars are int, float, bool or str; arrays are numpy arrays or lists of str.

    The header's parser has checked that every value lies inside the header.

    Every access decodes anew from the model file's mapping: the file must be open, and what is used often kept.
    The get_ methods raise InvalidModel, naming the key, when the value is of another type, and when it is
    missing and no default is given.
    """

    __slots__ = ("_buffer", "_entries", "_name")

    def __init__(self, buffer: Buffer, entries: Mapping[str, Entry], name: str) -> None:
        self._buffer, self._entries, self._name = buffer, entries, name

    def __getitem__(self, key: str) -> Value:
        entry = self._entries[key]
        if entry.length is None:
            return self._scalar(key, entry)
        return self._strings(key, entry) if entry.type is ValueType.STRING else self._array(key, entry)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def is_array(self, key: str) -> bool:
        """Whether the key is there and its value is an array."""
        return key in self._entries and self._entries[key].length is not None

    def array_length(self, key: str) -> int:
        """The number of elements of an array, without decoding it."""
        return self._find_array(key)[1]

    @overload
    def get_int(self, key: str) -> int: ...
    @overload
    def get_int(self, key: str, default: Default) -> int | Default: ...
    def get_int(self, key: str, default: Any = ...) -> Any:
        """An integer of any width."""
        return self._get(key, default, _INTEGERS, "an integer")

    @overload
    def get_float(self, key: str) -> float: ...
    @overload
    def get_float(self, key: str, default: Default) -> float | Default: ...
    def get_float(self, key: str, default: Any = ...) -> Any:
        """A floating-point number of either width; it may be infinite or not a number."""
        return self._get(key, default, _FLOATS, "a floating-point number")

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, default: Default) -> str | Default: ...
    def get_str(self, key: str, default: Any = ...) -> Any:
        """A string."""
        return self._get(key, default, _STRINGS, "a string")

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, default: Default) -> bool | Default: ...
    def get_bool(self, key: str, default: Any = ...) -> Any:
        """A truth value."""
        return self._get(key, default, _BOOLS, "a truth value")

    def get_array(self, key: str) -> NDArray[Any]:
        """An array of numbers or truth values, as a read-only copy in its own type."""
        entry, _ = self._find_array(key)
        if entry.type is ValueType.STRING:
            raise self._wrong_type(key, entry, "an array of numbers")
        return self._array(key, entry)

    def get_strings(self, key: str) -> list[str]:
        """An array of strings."""
        entry, _ = self._find_array(key)
        if entry.type is not ValueType.STRING:
            raise self._wrong_type(key, entry, "an array of strings")
        return self._strings(key, entry)

    def _get(self, key: str, default: Any | EllipsisType, kinds: frozenset[ValueType], expected: str) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            if default is ...:
                raise InvalidModel(f"the key {key} is missing", self._name)
            return default
        if entry.length is not None or entry.type not in kinds:
            raise self._wrong_type(key, entry, expected)
        return self._scalar(key, entry)

    def _find_array(self, key: str) -> tuple[Entry, int]:
        entry = self._entries.get(key)
        if entry is None:
            raise InvalidModel(f"the key {key} is missing", self._name)
        if entry.length is None:
            raise self._wrong_type(key, entry, "an array")
        return entry, entry.length

    def _wrong_type(self, key: str, entry: Entry, expected: str) -> InvalidModel:
        found = entry.type.name if entry.length is None else f"array of {entry.type.name}"
        return InvalidModel(f"{key} is of type {found}, expected {expected}", self._name, entry.offset)

    def _scalar(self, key: str, entry: Entry) -> bool | int | float | str:
        if entry.type is ValueType.STRING:
            return self._text(key, entry.offset)
        value: int | float = struct.unpack_from(entry.type.layout, self._buffer, entry.offset)[0]
        if entry.type is not ValueType.BOOL:
            return value
        if value > 1:
            raise InvalidModel(f"{key} is {value}, expected 0 or 1", self._name, entry.offset)
        return bool(value)

    def _array(self, key: str, entry: Entry) -> NDArray[Any]:
        nbytes = (entry.length or 0) * entry.type.nbytes
        array = np.frombuffer(self._buffer[entry.offset : entry.offset + nbytes], entry.type.layout)
        if entry.type is not ValueType.BOOL:
            return array
        if array.max(initial=0) > 1:
            raise InvalidModel(f"{key} has elements other than 0 and 1", self._name, entry.offset)
        return array.view(np.bool_)

    def _strings(self, key: str, entry: Entry) -> list[str]:
        buffer, length_at = self._buffer, LENGTH.unpack_from
        texts = []
        start = entry.offset + 8
        try:
            for _ in range(entry.length or 0):
                stop = start + length_at(buffer, start - 8)[0]
                texts.append(buffer[start:stop].decode())
                start = stop + 8
        except UnicodeDecodeError as error:
            raise InvalidModel(f"{key}[{len(texts)}] is not UTF-8", self._name, start + error.start) from None
        return texts

    def _text(self, key: str, offset: int) -> str:
        start = offset + 8
        stop = start + LENGTH.unpack_from(self._buffer, offset)[0]
        try:
            return self._buffer[start:stop].decode()
        except UnicodeDecodeError as error:
            raise InvalidModel(f"{key} is not UTF-8", self._name, start + error.start) from None
