"""Turns a model's spec and a layer range into ggml graphs: one per shape of step, computed again and again.

A graph depends on how many rows and runs a step has, never on positions or lengths. Keys and values are written where
an input says (`ggml_set_rows`), and each run attends through a view of its own slot's cells; of those views, start
and length are written into the tensor structs before each computation. So attention costs what each sequence's own
length costs, and what a row computes depends on its own sequence alone.
"""

from typing import NamedTuple

import numpy as np

from eldric.engine.errors import OutOfMemory, UnsupportedModel
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import Backend
from eldric.engine.ggml.kv import KVCache
from eldric.engine.ggml.ports import Port, Ports
from eldric.engine.ggml.structs import Tensor
from eldric.engine.ggml.weights import Weights
from eldric.engine.shard import Shard
from eldric.engine.spec import ModelSpec

_ROPE_MODES = {"norm": 0, "neox": 2}  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # without effect unless rope is extended by YaRN
_LENGTH = Tensor.ne.offset + 8  # of a K or V view: ne[1]
_COLUMNS = Tensor.ne.offset  # of a mask view: ne[0]
_START = Tensor.data.offset


class GraphShape(NamedTuple):
    """What a graph is built for."""

    runs: int  # of one row each; 0 for one run of many rows: a chunk of a prompt
    rows: int  # padding included
    logits: bool  # of every row, or of one row of a chunk; on the tail only

    @property
    def is_chunk(self) -> bool:
        return self.runs == 0


class Graph:
    """An allocated graph, and the struct fields that say what each run attends to."""

    def __init__(self, arena: Arena, handle: int, views: list[list[int]], masks: list[int]) -> None:
        """views: for each K and V of each layer that attends, the view tensors of all runs."""
        self.arena, self.handle = arena, handle
        self._lengths = np.array([[arena.word(view, _LENGTH) for view in runs] for runs in views], np.int64)
        self._starts = np.array([[arena.word(view, _START) for view in runs] for runs in views], np.int64)
        self._columns = np.array([arena.word(mask, _COLUMNS) for mask in masks], np.int64)
        self._slot_0 = arena.words[self._starts]  # a copy: where each view lies over slot 0
        self._slots: list[int] = []

    def attend(self, slots: list[int], slot_bytes: int, lengths: list[int]) -> None:
        """Let run i attend to the first lengths[i] cells of slots[i]."""
        words = self.arena.words
        words[self._lengths] = lengths
        words[self._columns] = lengths[0]
        if slots != self._slots:
            words[self._starts] = self._slot_0 + np.array(slots, np.int64) * slot_bytes
            self._slots = slots

    def close(self) -> None:
        self.arena.close()


class GraphBuilder:
    """Knows a stage's weights, cache and ports, and builds its graphs. Tensor shapes below are in ggml's order."""

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        shard: Shard,
        weights: Weights,
        cache: KVCache,
        ports: Ports,
        exact: bool,
    ) -> None:
        """exact: what a row computes shall not depend on the number of rows beside it, nor on that of threads."""
        self.backend, self.api = backend, backend.api
        self.spec, self.shard, self.weights, self.cache, self.ports = spec, shard, weights, cache, ports
        self.exact = exact
        factors = spec.rope.freq_factors
        self.freq_factors = weights[factors].plain if factors else None

    def build(self, shape: GraphShape) -> "GraphPlan":
        """Lay out a graph of this shape; its tensors have no memory yet. Raises UnsupportedModel."""
        return GraphPlan(self, shape)

    def weight(self, role: str, layer: int = 0) -> str:
        return self.spec.family.tensors[role].name_in(layer)


class GraphPlan:
    """One graph while it is built."""

    def __init__(self, builder: GraphBuilder, shape: GraphShape) -> None:
        self.b, self.shape = builder, shape
        self.api, self.spec, self.ports = builder.api, builder.spec, builder.ports
        runs = max(shape.runs, 1)
        nodes = 64 + len(builder.shard.layers) * (40 + 5 * runs)
        self.arena = Arena(self.api, nodes, nodes)
        self.ctx, self.handle = self.arena.ctx, self.arena.graph
        self.views: list[list[int]] = []
        self.masks: list[int] = []
        try:
            self._build()
            self._check()
        except BaseException:
            self.arena.close()
            raise

    def finish(self) -> Graph:
        """Call when every tensor has its memory."""
        return Graph(self.arena, self.handle, self.views, self.masks)

    def _build(self) -> None:
        shape, shard = self.shape, self.b.shard
        if shard.is_head:
            ids = self._rows_of(self.ports.tokens, shape.rows)
            hidden = self.api.ggml_get_rows(self.ctx, self.b.weights[self.b.weight("token_embd")].plain, ids)
        else:
            hidden = self._rows_of(self.ports.hidden_in, shape.rows)
        final = shard.layers.stop - 1
        for index, layer in enumerate(range(shard.layers.start, shard.layers.stop)):
            hidden = self._layer(index, layer, hidden, ends_model=shard.is_tail and layer == final)
        if hidden and shard.is_tail and self.ports.logits is not None:
            rows = 1 if shape.is_chunk else shape.rows
            normed = self._norm(hidden, "output_norm")
            output = "token_embd" if self.spec.tied_output else "output"
            logits = self.api.ggml_mul_mat(self.ctx, self._matrix(self.b.weight(output), rows), normed)
            hidden = self._place(logits, self.ports.logits)
        elif hidden:
            self._place(hidden, self.ports.hidden_out)
        if hidden:
            self._expand(hidden)

    def _layer(self, index: int, layer: int, hidden: int, ends_model: bool) -> int:
        """hidden: [hidden_size, rows]. Returns the same; where the model ends, of a chunk only the row that gets
        logits, or 0 if none are wanted: then keys and values are all that the layer is for."""
        api, ctx, spec, shape = self.api, self.ctx, self.spec, self.shape
        normed = self._norm(hidden, "attn_norm", layer)
        positions = self._rows_of(self.ports.positions, shape.rows)
        rows = shape.rows
        self._write_cache(index, layer, normed, positions)
        if ends_model and not shape.logits:
            return 0
        queries = self._product("attn_q", layer, normed, rows)
        queries = self._rope(api.ggml_reshape_3d(ctx, queries, spec.head_dim, spec.heads, rows), positions)
        attended = self._product("attn_output", layer, self._attend(index, queries), rows)
        if ends_model and shape.is_chunk:
            rows, last = 1, self.ports.last_row.tensor
            attended, hidden = api.ggml_get_rows(ctx, attended, last), api.ggml_get_rows(ctx, hidden, last)
        hidden = api.ggml_add(ctx, attended, hidden)
        normed = self._norm(hidden, "ffn_norm", layer)
        gate, up = (self._product(role, layer, normed, rows) for role in ("ffn_gate", "ffn_up"))
        down = self._product("ffn_down", layer, api.ggml_swiglu_split(ctx, gate, up), rows)
        return api.ggml_add(ctx, down, hidden)  # type: ignore[no-any-return]

    def _write_cache(self, index: int, layer: int, normed: int, positions: int) -> None:
        api, ctx, spec, cache = self.api, self.ctx, self.spec, self.b.cache
        rows = self.shape.rows
        cells = self._rows_of(self.ports.cells, rows)
        keys = self._product("attn_k", layer, normed, rows)
        keys = self._rope(api.ggml_reshape_3d(ctx, keys, spec.head_dim, spec.kv_heads, rows), positions)
        values = self._product("attn_v", layer, normed, rows)
        for store, new in ((cache.keys[index], keys), (cache.values[index], values)):
            head = 4 * spec.head_dim
            by_head = api.ggml_view_3d(ctx, new, spec.head_dim, rows, spec.kv_heads, head * spec.kv_heads, head, 0)
            self._expand(api.ggml_set_rows(ctx, store, by_head, cells))

    def _attend(self, index: int, queries: int) -> int:
        """queries: [head_dim, heads, rows]. Returns [heads * head_dim, rows], in the port that it always fills.

        A row of a decode step sees all that its slot holds, so it needs no mask.
        """
        api, ctx, spec, cache, port = self.api, self.ctx, self.spec, self.b.cache, self.ports.attended
        head, row = 4 * spec.head_dim, 4 * spec.head_dim * spec.heads
        rows = self.shape.rows
        per_run, mask = 1, None
        if self.shape.is_chunk:
            per_run = rows
            mask = api.ggml_view_2d(
                ctx, self.ports.mask.tensor, self.ports.mask.width, rows, self.ports.mask.row_bytes, 0
            )
            self.masks.append(mask)
        self._expand(queries)
        keys, values = [], []
        for run in range(max(self.shape.runs, 1)):
            query = api.ggml_view_3d(ctx, queries, spec.head_dim, per_run, spec.heads, row, head, run * row)
            keys.append(self._slot_view(cache.keys[index]))
            values.append(self._slot_view(cache.values[index]))
            result = api.ggml_flash_attn_ext(ctx, query, keys[-1], values[-1], mask, spec.head_dim**-0.5, 0.0, 0.0)
            self._expand(self._place(result, port, run))
        self.views += [keys, values]
        return self._rows_of(port, rows)

    def _slot_view(self, cells: int) -> int:
        """Keys or values of slot 0 as [head_dim, context, kv_heads]; Graph.attend moves and shortens it."""
        cache, dim = self.b.cache, self.spec.head_dim
        head_bytes = cache.cells * cache.cell_bytes
        view: int = self.api.ggml_view_3d(
            self.ctx, cells, dim, cache.context, cache.kv_heads, cache.cell_bytes, head_bytes, 0
        )
        return view

    def _rope(self, heads: int, positions: int) -> int:
        rope = self.spec.rope
        turned: int = self.api.ggml_rope_ext(
            self.ctx,
            heads,
            positions,
            self.b.freq_factors,
            rope.dim,
            _ROPE_MODES[rope.kind],
            self.spec.context_length,
            rope.base,
            1.0 / rope.factor,
            0.0,
            1.0,
            _BETA_FAST,
            _BETA_SLOW,
        )
        return turned

    def _norm(self, hidden: int, role: str, layer: int = 0) -> int:
        scale = self.b.weights[self.b.weight(role, layer)].plain
        normed: int = self.api.ggml_mul(self.ctx, self.api.ggml_rms_norm(self.ctx, hidden, self.spec.norm_eps), scale)
        return normed

    def _product(self, role: str, layer: int, vectors: int, rows: int) -> int:
        """A weight matrix times each row, and the bias if the model has one."""
        matrix = self._matrix(self.b.weight(role, layer), rows)
        product: int = self.api.ggml_mul_mat(self.ctx, matrix, vectors)
        bias = f"{role}_bias"
        if bias in self.spec.family.tensors and (name := self.b.weight(bias, layer)) in self.b.weights:
            product = self.api.ggml_add(self.ctx, product, self.b.weights[name].plain)
        return product

    def _matrix(self, name: str, rows: int) -> int:
        """Decode steps of any number of rows use the same layout in exact mode."""
        weight = self.b.weights[name]
        if self.b.exact and not self.shape.is_chunk:
            return weight.packed or weight.plain
        return weight.matrix(rows)

    def _rows_of(self, port: Port, rows: int) -> int:
        view: int
        if port.width == 1:
            view = self.api.ggml_view_1d(self.ctx, port.tensor, rows, 0)
        else:
            view = self.api.ggml_view_2d(self.ctx, port.tensor, port.width, rows, port.row_bytes, 0)
        return view

    def _place(self, result: int, port: Port, row: int = 0) -> int:
        """Have an operation write its result into a port, from a row on."""
        address = self.api.ggml_get_data(port.tensor) + row * port.row_bytes
        self.api.ggml_backend_tensor_alloc(self.ports.buffer, result, address)
        return result

    def _expand(self, node: int) -> None:
        """Add a node, and what it needs, behind all nodes so far: ggml computes them in this order."""
        self.api.ggml_build_forward_expand(self.handle, node)

    def _check(self) -> None:
        """A device aborts on an operation that it does not have; ask first."""
        device, api = self.b.backend.device, self.api
        for index in range(api.ggml_graph_n_nodes(self.handle)):
            node = api.ggml_graph_node(self.handle, index)
            if not api.ggml_backend_dev_supports_op(device.handle, node):
                what = api.ggml_op_desc(node).decode()
                raise UnsupportedModel(f"device {device.name} cannot compute {what} on this model's types")


class GraphCache:
    """Built graphs by shape. They share one scratch buffer, and the longest unused one goes when there are too many."""

    def __init__(self, builder: GraphBuilder, limit: int) -> None:
        self._builder, self._api, self._limit = builder, builder.api, limit
        self._allocator: int = builder.api.ggml_gallocr_new(builder.backend.buffer_type)
        self._graphs: dict[GraphShape, Graph] = {}  # from the longest unused to the last used

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory and of all graphs' structs."""
        scratch: int = self._api.ggml_gallocr_get_buffer_size(self._allocator, 0)
        return scratch + sum(graph.arena.nbytes for graph in self._graphs.values())

    def get(self, shape: GraphShape) -> Graph:
        """Raises OutOfMemory or UnsupportedModel."""
        graph = self._graphs.pop(shape, None)
        if graph is None:
            graph = self._make(shape)
        self._graphs[shape] = graph
        return graph

    def _make(self, shape: GraphShape) -> Graph:
        if len(self._graphs) >= self._limit:
            self._graphs.pop(next(iter(self._graphs))).close()
        plan = self._builder.build(shape)
        before = self._api.ggml_gallocr_get_buffer_size(self._allocator, 0)
        if not self._api.ggml_gallocr_alloc_graph(self._allocator, plan.handle):
            plan.arena.close()
            raise OutOfMemory(f"no scratch memory for a step of {shape.rows} rows")
        if self._api.ggml_gallocr_get_buffer_size(self._allocator, 0) != before:
            self._drop_all()  # the scratch buffer moved, and the older graphs' tensors with it
        return plan.finish()

    def _drop_all(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def close(self) -> None:
        self._drop_all()
        if self._allocator:
            self._api.ggml_gallocr_free(self._allocator)
            self._allocator = 0
