"""A graph that is computed again and again: only what goes in and what it attends to changes in between."""

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.ports import Ports
from eldric.engine.ggml.structs import Tensor

_LENGTH = Tensor.ne.offset + 8  # of a K or V view: ne[1]
_COLUMNS = Tensor.ne.offset  # of a mask view: ne[0]
_ROW_BYTES = Tensor.nb.offset + 8  # of a mask view: nb[1]
_START, _OFFSET = Tensor.data.offset, Tensor.view_offs.offset  # the same twice: devices go by one or by the other
_MASK_BYTES = 2  # of a mask's value, F16


class GraphShape(NamedTuple):
    """What a graph is built for."""

    runs: int  # of one row each; 0 for one run of many rows: a chunk of a prompt
    rows: int  # padding included
    logits: bool  # of every row, or of one row of a chunk; on the tail only

    @property
    def is_chunk(self) -> bool:
        return self.runs == 0


class Graph:
    """An allocated graph, what it reads and writes, and the struct fields that say what each run attends to.

    Written for few and small operations. Between two steps of a large model, hundreds of megabytes of weights pass
    through the CPU's caches, so that every line of Python's and numpy's own code comes from memory again.
    """

    def __init__(
        self,
        arena: Arena,
        shape: GraphShape,
        ports: Ports,
        views: list[int],
        masks: list[int],
        finds_likeliest: bool,
    ) -> None:
        """views: K and V views of each layer that attends, each for all runs, made one behind the other.
        masks: those of all runs, likewise, or none. finds_likeliest: whether the graph looks through the logits."""
        self.handle, self._arena = arena.graph, arena
        self.rows = shape.rows
        runs, used = max(shape.runs, 1), shape.runs or shape.rows
        self._starts = arena.field(views, _START).reshape(-1, runs)
        self._slot_0 = self._starts.copy()  # where each view lies over slot 0
        self._offsets = arena.field(views, _OFFSET).reshape(-1, runs)
        self._slots: list[int] = []
        self._columns = arena.field(masks, _COLUMNS) if masks else None
        self._mask_rows = arena.field(masks, _ROW_BYTES)
        self._layers_views = len(views) // runs
        self._lengths = arena.field(views, _LENGTH).data
        self._inputs = ports.integers.array.data.cast("B")
        rows, gap = shape.rows, 4 * (ports.section(shape.rows) - shape.rows)
        integers = 3 * ports.section(rows) + 1
        first = -(-4 * integers // 8)  # the lengths lie behind, where nothing but attend reads them
        self._new_lengths = self._inputs[8 * first : 8 * (first + len(views))].cast("B").cast("l")
        behind = 8 * first - 4 * integers
        self._pack = struct.Struct(f"={f'{rows}i{gap}x' * 3}i{behind}x{len(views)}q").pack_into
        self.hidden_in = ports.hidden_in.array[:used]
        self.result: NDArray[np.float32] | None = None  # hidden states or logits, of rows that are no padding
        self.likeliest: NDArray[np.int32] | None = None  # the token with the largest logit, of each such row
        self.final: NDArray[np.float32] | None = None  # what the logits were made of, of each such row
        if ports.logits is None:
            self.result = ports.hidden_out.array[:used]
        elif shape.logits:
            self.result = ports.logits.array[: shape.runs or 1]
            self.final = ports.hidden_out.array[: shape.runs or 1]
            if finds_likeliest and ports.likeliest is not None:
                self.likeliest = ports.likeliest.array[: shape.runs or 1]

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    def feed(self, ids: list[int], positions: list[int], cells: list[int], last_row: int, lengths: list[int]) -> None:
        """Write token ids, positions and KV cells of all rows, and which row of a chunk gets logits. Let run i attend
        to the first lengths[i] cells of its slot, as far as its mask lets it."""
        self._pack(self._inputs, 0, *ids, *positions, *cells, last_row, *lengths * self._layers_views)
        self._lengths[:] = self._new_lengths
        if self._columns is not None:
            self._columns[...] = lengths
            self._mask_rows[...] = _MASK_BYTES * lengths[0]

    @property
    def is_masked(self) -> bool:
        """Whether masks say what each row attends to."""
        return self._columns is not None

    def move(self, slots: list[int], slot_bytes: int) -> None:
        """Let run i attend to slots[i]."""
        if slots != self._slots:
            moved = np.array(slots, np.int64) * slot_bytes
            self._starts[...] = self._slot_0 + moved
            self._offsets[...] = moved
            self._slots = slots

    def close(self) -> None:
        self._arena.close()
