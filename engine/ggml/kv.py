"""The KV cache of a stage: for each of its layers, keys and values of every slot's positions."""

from collections.abc import Sequence

from eldric.engine.ggml.api import Api
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import Backend
from eldric.engine.shard import LayerRange
from eldric.engine.spec import ModelSpec
from eldric.engine.tensor_types import TensorType


class KVCache:
    """Slots of `context` cells each; the cell of position p of slot s has index s * context + p in every layer.

    Each layer's keys, and likewise its values, are one tensor [kv_heads * head_dim, cells]. Behind the slots lie
    `spare` cells, where rows that only pad a step are written.
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
        self.slots, self.context, self.first_spare = slots, context, slots * context
        self.width = spec.kv_heads * spec.head_dim
        self.row_bytes = kind.row_bytes(self.width)
        self.head_bytes = kind.row_bytes(spec.head_dim)
        self.slot_bytes = context * self.row_bytes
        cells = self.first_spare + spare
        api = backend.api
        self._arena = Arena(api, 2 * len(layers))
        self.keys: Sequence[int] = [self._tensor(api, kind, cells) for _ in range(len(layers))]
        self.values: Sequence[int] = [self._tensor(api, kind, cells) for _ in range(len(layers))]
        self._buffer = backend.allocate(self._arena, f"KV cache of {slots} slots of {context} cells")
        api.ggml_backend_buffer_clear(self._buffer.handle, 0)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def close(self) -> None:
        self._buffer.close()
        self._arena.close()

    def _tensor(self, api: Api, kind: TensorType, cells: int) -> int:
        tensor: int = api.ggml_new_tensor_2d(self._arena.ctx, int(kind), self.width, cells)
        return tensor
