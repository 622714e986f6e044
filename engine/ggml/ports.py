"""The fixed tensors through which a step's data enter and leave every graph of a stage."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import Backend
from eldric.engine.tensor_types import TensorType

_MASKED = -np.inf
_DTYPES: dict[TensorType, DTypeLike] = {
    TensorType.F32: np.float32,
    TensorType.F16: np.float16,
    TensorType.I32: np.int32,
}


class Port:
    """A tensor [width, rows] and the same as an array [rows, width]; for width 1, both are [rows]."""

    def __init__(self, arena: Arena, backend: Backend, kind: TensorType, width: int, rows: int) -> None:
        self._backend = backend
        self.kind, self.width, self.rows = kind, width, rows
        self.row_bytes = kind.row_bytes(width)
        if width == 1:
            self.tensor: int = backend.api.ggml_new_tensor_1d(arena.ctx, int(kind), rows)
        else:
            self.tensor = backend.api.ggml_new_tensor_2d(arena.ctx, int(kind), width, rows)
        self.array: NDArray[Any] = np.empty(0)

    def open(self) -> None:
        """Lay the array over the tensor's memory, or beside it when that is not the process's own."""
        dtype = np.dtype(_DTYPES[self.kind])
        if self._backend.is_host:
            address = self._backend.api.ggml_get_data(self.tensor)
            flat = _array_at(address, self.rows * self.width, dtype)
        else:
            flat = np.zeros(self.rows * self.width, dtype)
        self.array = flat if self.width == 1 else flat.reshape(self.rows, self.width)

    def upload(self, nbytes: int) -> None:
        if nbytes:
            self._backend.api.ggml_backend_tensor_set(self.tensor, self.array.ctypes.data, 0, nbytes)

    def download(self, rows: int) -> None:
        data = self.array.ctypes.data
        self._backend.api.ggml_backend_tensor_get(self.tensor, data, 0, rows * self.row_bytes)


class Ports:
    """All ports of a stage. Rows beyond those in use keep old values, which only rows that pad a step ever see."""

    def __init__(
        self,
        backend: Backend,
        *,
        rows: int,
        hidden_size: int,
        attention_size: int,
        context: int,
        views: int,
        logit_rows: int,
        vocab_size: int,
    ) -> None:
        """views: most views of keys and values in a graph, whose lengths are kept beside the integers. logit_rows: 0
        where there is no output matrix. Raises OutOfMemory.
        """
        self._arena = Arena(backend.api, 16)

        def port(kind: TensorType, width: int, count: int) -> Port:
            return Port(self._arena, backend, kind, width, count)

        # Devices read inputs from addresses that are multiples of this; the CPU from any, which keeps them together.
        self._section = 1 if backend.is_cpu else max(1, backend.alignment // TensorType.I32.type_bytes)
        self.integers = port(TensorType.I32, 1, 3 * self.section(rows) + 2 + 2 * views)  # see Graph.feed
        self.hidden_in = port(TensorType.F32, hidden_size, rows)
        self.mask = port(TensorType.F16, context, rows)  # a chunk's rows lie together, as far as they are long
        self.attended = port(TensorType.F32, attention_size, rows)  # what attention gives, before its output matrix
        self.hidden_out = port(TensorType.F32, hidden_size, rows)
        self.logits = port(TensorType.F32, vocab_size, logit_rows) if logit_rows else None
        self.likeliest = port(TensorType.I32, 1, logit_rows) if logit_rows else None  # of each row of logits
        self._buffer = backend.allocate(self._arena, "inputs and outputs of a step")
        backend.api.ggml_backend_buffer_clear(self._buffer.handle, 0)
        for value in vars(self).values():
            if isinstance(value, Port):
                value.open()
        self._mask_bytes = 0  # of the mask that was written last
        self._strip = np.full(2 * (context + rows), _MASKED, np.float16)
        self._strip[: context + rows] = 0.0

    @property
    def buffer(self) -> int:
        return self._buffer.handle

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._strip.nbytes

    def section(self, rows: int) -> int:
        """How far apart ids, positions and cells of so many rows lie among the integers."""
        return -(-rows // self._section) * self._section

    def write_causal_mask(self, position: int, rows: int, length: int) -> None:
        """Row i may attend to the first position + i + 1 of `length` cells.

        Each row is the one above it, shifted by one: rows are views of one strip of zeros and then infinities.
        """
        first = len(self._strip) // 2 - position - 1
        size = self._strip.itemsize
        shifted = np.lib.stride_tricks.as_strided(self._strip[first:], (rows, length), (-size, size), writeable=False)
        self.mask.array.reshape(-1)[: rows * length].reshape(rows, length)[...] = shifted
        self._mask_bytes = rows * length * size

    def write_row_masks(self, ends: list[int], lengths: list[int]) -> None:
        """Row i may attend to the first ends[i] of lengths[i] cells."""
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            self.mask.array[row, :end] = 0.0
            self.mask.array[row, end:length] = _MASKED
        self._mask_bytes = len(ends) * self.mask.row_bytes

    def upload(self, rows: int, hidden_rows: int) -> None:
        """Bring the inputs of a step to a device whose memory is not the process's own.

        hidden_rows: 0 if the graph takes ids.
        """
        self.integers.upload(4 * (3 * self.section(rows) + 1))
        self.hidden_in.upload(hidden_rows * self.hidden_in.row_bytes)
        self.mask.upload(self._mask_bytes)

    def download(self, rows: int) -> None:
        """Bring the results from there."""
        (self.logits or self.hidden_out).download(rows)

    def close(self) -> None:
        for value in vars(self).values():
            if isinstance(value, Port):
                value.array = np.empty(0)  # nothing may look at memory that is given back
        self._buffer.close()
        self._arena.close()


def _array_at(address: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array over memory that ggml owns; whoever frees it must drop the array."""
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memoryview(raw), dtype)
