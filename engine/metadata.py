"""A GGUF file's key-value pairs, decoded when they are asked for."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Default = TypeVar("Default")
Value = bool | int | float | str | list[str] | NDArray[Any]


class Metadata(Mapping[str, Value]):
    """Mapping of key to value. Scalars are int, float, bool or str; arrays are numpy arrays or lists of str."""

    def __getitem__(self, key: str) -> Value:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @overload
    def get_int(self, key: str) -> int: ...
    @overload
    def get_int(self, key: str, default: Default) -> int | Default: ...
    def get_int(self, key: str, default: Any = ...) -> Any:
        raise NotImplementedError

    @overload
    def get_float(self, key: str) -> float: ...
    @overload
    def get_float(self, key: str, default: Default) -> float | Default: ...
    def get_float(self, key: str, default: Any = ...) -> Any:
        raise NotImplementedError

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, default: Default) -> str | Default: ...
    def get_str(self, key: str, default: Any = ...) -> Any:
        raise NotImplementedError

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, default: Default) -> bool | Default: ...
    def get_bool(self, key: str, default: Any = ...) -> Any:
        raise NotImplementedError

    def get_array(self, key: str) -> NDArray[np.generic]:
        """A numeric array, as a copy in its own type. Raises InvalidModel if missing or of another type."""
        raise NotImplementedError

    def get_strings(self, key: str) -> list[str]:
        """An array of strings. Raises InvalidModel if missing, of another type or not UTF-8."""
        raise NotImplementedError

    def array_length(self, key: str) -> int:
        """The number of elements of an array, without decoding it."""
        raise NotImplementedError
