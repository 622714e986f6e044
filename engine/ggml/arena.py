"""A ggml context for tensor structs and graphs, in memory that numpy can write.

Between two computations of one graph, only a few struct fields change: where the K and V that a run attends to begin,
and how many there are. They are written as 64-bit words, for all layers at once, without a call per field.
"""

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import OutOfMemory
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

    def word(self, tensor: int, field_offset: int) -> int:
        """Where in `words` a tensor's field lies, given the field's offset in the struct in bytes."""
        return (tensor + field_offset - self._address) // _WORD

    def close(self) -> None:
        if self.ctx:
            self._api.ggml_free(self.ctx)
            self.ctx = self.graph = 0
