"""A ggml context for tensor structs and graphs, in memory that numpy can write.

Between two computations of one graph, only a few struct fields change: where the K and V that a run attends to begin,
and how many there are. They are written as 64-bit words, for all layers at once, without a call per field.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import LibraryError, OutOfMemory
from eldric.engine.ggml.api import Api
from eldric.engine.ggml.structs import InitParams

_WORD = 8
_ALIGNMENT = 64


class Arena:
    """Holds the structs of up to `tensors` tensors, and of one graph of up to `graph_nodes` nodes; no tensor data."""

    def __init__(self, api: Api, tensors: int, graph_nodes: int = 0) -> None:
        self._api = api
        nbytes = tensors * api.ggml_tensor_overhead()
        if graph_nodes:
            nbytes += api.ggml_graph_overhead_custom(graph_nodes, False) + _ALIGNMENT
        memory = np.zeros(nbytes // _WORD + _ALIGNMENT, np.int64)
        skipped = -memory.ctypes.data % _ALIGNMENT // _WORD
        self.words: NDArray[np.int64] = memory[skipped:]  # the structs, as 64-bit words
        self._address: int = self.words.ctypes.data
        self.ctx: int = api.ggml_init(InitParams(self.words.nbytes, self._address, True)) or 0
        if not self.ctx:
            raise OutOfMemory(f"ggml has no context left for {tensors} tensors")
        self.graph: int = api.ggml_new_graph_custom(self.ctx, graph_nodes, False) if graph_nodes else 0

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def field(self, tensors: Sequence[int], offset: int) -> NDArray[np.int64]:
        """One field of several tensors as an array, to be written to. offset: in the struct, in bytes.

        The tensors must have been made one behind the other, so that the array has a single stride.
        """
        if not tensors:
            return self.words[:0]
        first = (tensors[0] + offset - self._address) // _WORD
        if len(tensors) == 1:
            return self.words[first : first + 1]
        stride = (tensors[1] - tensors[0]) // _WORD
        found = self.words[first::stride][: len(tensors)]
        if found[-1:].ctypes.data != tensors[-1] + offset:
            raise LibraryError("ggml does not lay tensors out one behind the other")
        return found

    def close(self) -> None:
        if self.ctx:
            self._api.ggml_free(self.ctx)
            self.ctx = self.graph = 0
