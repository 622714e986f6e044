"""The KV cache of a stage: for each of its layers, keys and values of every slot's positions."""

import ctypes
from collections.abc import Sequence

from eldric.engine.errors import OutOfMemory
from eldric.engine.ggml.api import Api
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import Backend
from eldric.engine.shard import LayerRange
from eldric.engine.spec import ModelSpec
from eldric.engine.tensor_types import TensorType


class KVCache:
    """Slots of `stride` cells each; the cell of position p of slot s has index s * stride + p in every layer.

    Each layer's keys, and likewise its values, are one tensor [head_dim, cells, kv_heads]: what a head reads lies
    together, which makes attention over 2000 cells 1.5 times as fast as whole rows of all heads do. Behind the slots
    lie `spare` cells, where rows that only pad a step are written.
    """

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        layers: LayerRange,
        *,
        slots: int,
        context: int,
        spare: int,
        kind: TensorType,
    ) -> None:
        """Takes all of its memory at once, zeroed. Raises OutOfMemory."""
        self.stride = -(-context // backend.cell_multiple) * backend.cell_multiple
        self.first_spare = slots * self.stride
        self.head_dim, self.kv_heads = spec.head_dim, spec.kv_heads
        self.cell_bytes = kind.row_bytes(spec.head_dim)  # of one head
        self.slot_bytes = self.stride * self.cell_bytes
        what = f"KV cache of {slots} slots of {context} cells"
        self.cells = self.first_spare + spare
        if self.cells >= 1 << 31:  # cells are numbered with 32 bits
            raise OutOfMemory(f"{backend.device.name} cannot hold the {what}")
        api = backend.api
        self._arena = Arena(api, 2 * len(layers))
        self.keys: Sequence[int] = [self._tensor(api, kind) for _ in range(len(layers))]
        self.values: Sequence[int] = [self._tensor(api, kind) for _ in range(len(layers))]
        self._buffer = backend.allocate(self._arena, what)
        api.ggml_backend_buffer_clear(self._buffer.handle, 0)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def close(self) -> None:
        self._buffer.close()
        self._arena.close()

    def _tensor(self, api: Api, kind: TensorType) -> int:
        sizes = (ctypes.c_int64 * 3)(self.head_dim, self.cells, self.kv_heads)
        tensor: int = api.ggml_new_tensor(self._arena.ctx, int(kind), 3, sizes)
        return tensor
