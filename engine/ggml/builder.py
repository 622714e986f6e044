"""Turns a model's spec and a layer range into ggml graphs: one per shape of step, computed again and again.

A graph depends on how many rows and runs a step has, never on positions or lengths. Keys and values are written where
an input says (`ggml_set_rows`), and each run attends through a view of its own slot's cells; of those views, start
and length are written into the tensor structs before each computation. So attention costs what each sequence's own
length costs, and what a row computes depends on its own sequence alone.
"""

import ctypes

from eldric.engine.errors import UnsupportedModel
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import Backend
from eldric.engine.ggml.graph import Graph, GraphShape
from eldric.engine.ggml.kv import KVCache
from eldric.engine.ggml.ports import Port, Ports
from eldric.engine.ggml.structs import Tensor
from eldric.engine.ggml.weights import Weights
from eldric.engine.kernels.attending import Attention
from eldric.engine.kernels.compiler import largest_kernel
from eldric.engine.kernels.panels import Panel
from eldric.engine.shard import Shard
from eldric.engine.spec import ModelSpec
from eldric.engine.tensor_types import TensorType

_ROPE_MODES = {"norm": 0, "neox": 2}  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX
_ALL_THREADS = -1  # GGML_N_TASKS_MAX
_IN_F32 = 10  # GGML_PREC_F32: sums are not kept in half precision, which some devices would do
_IDS, _POSITIONS, _CELLS, _LAST_ROW = range(4)  # sections of the integers that go into a graph
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # without effect unless rope is extended by YaRN


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
        attention: Attention | None,
    ) -> None:
        """exact: what a row computes shall not depend on the number of rows beside it, nor on that of threads.
        attention: the engine's own kernel; None to take the device's."""
        self.backend, self.api = backend, backend.api
        self.spec, self.shard, self.weights, self.cache, self.ports = spec, shard, weights, cache, ports
        self.exact, self.attention = exact, attention
        self.largest = _largest_kernel(backend, spec.vocab_size)
        self.takes_ids = shard.is_head and weights.token_table is None
        factors = spec.rope.freq_factors
        self.freq_factors = weights[factors].plain if factors else None

    def build(self, shape: GraphShape) -> "GraphPlan":
        """Lay out a graph of this shape; its tensors have no memory yet. Raises UnsupportedModel."""
        return GraphPlan(self, shape)

    def weight(self, role: str, layer: int = 0) -> str:
        return self.spec.family.tensors[role].name_in(layer)


def _largest_kernel(backend: Backend, vocab_size: int) -> int | None:
    """The function that finds each row's largest value, where there is one for the device and so few values."""
    kernel = largest_kernel() if backend.is_cpu and backend.is_host else None
    return kernel[0] if kernel is not None and kernel[1] <= vocab_size else None


class GraphPlan:
    """One graph while it is built."""

    def __init__(self, builder: GraphBuilder, shape: GraphShape) -> None:
        self.b, self.shape = builder, shape
        self.api, self.spec, self.ports = builder.api, builder.spec, builder.ports
        runs = max(shape.runs, 1)
        nodes = 64 + len(builder.shard.layers) * (40 + 5 * runs)
        self.arena = Arena(self.api, nodes, nodes)
        self.ctx, self.handle = self.arena.ctx, self.arena.graph
        self.views: list[int] = []
        self.masks: list[int] = []
        try:
            self._make_views()
            self._build()
            self._check()
        except BaseException:
            self.arena.close()
            raise

    def finish(self) -> Graph:
        """Call when every tensor has its memory."""
        return Graph(self.arena, self.shape, self.ports, self.views, self.masks, self.b.largest is not None)

    def _make_views(self) -> None:
        """Keys and values as each run sees them in each layer: of slot 0, until Graph.attend moves them.

        They come first, one behind the other, so that they can be written to at once. Masks come before.
        """
        cache, shard, mask = self.b.cache, self.b.shard, self.ports.mask
        if self.b.attention is not None:
            pass  # it goes by positions
        elif self.shape.is_chunk:
            self.masks.append(self._rows_of(mask, self.shape.rows))
        elif self.b.backend.cell_multiple > 1:
            self.masks += [self._rows_of(mask, 1, run) for run in range(self.shape.runs)]
        layers = len(shard.layers) - (shard.is_tail and not self.shape.logits)
        for keys, values in zip(cache.keys[:layers], cache.values[:layers], strict=True):
            for cells in (keys, values):
                self.views += [self._slot_view(cells) for _ in range(max(self.shape.runs, 1))]

    def _build(self) -> None:
        shape, shard = self.shape, self.b.shard
        if self.b.takes_ids:
            ids = self._integers(_IDS, shape.rows)
            hidden = self.api.ggml_get_rows(self.ctx, self.b.weights[self.b.weight("token_embd")].plain, ids)
        else:
            hidden = self._rows_of(self.ports.hidden_in, shape.rows)
        final = shard.layers.stop - 1
        for index, layer in enumerate(range(shard.layers.start, shard.layers.stop)):
            hidden = self._layer(index, layer, hidden, ends_model=shard.is_tail and layer == final)
        if hidden and shard.is_tail and self.ports.logits is not None:
            rows = 1 if shape.is_chunk else shape.rows
            normed = self._place(self._norm(hidden, "output_norm"), self.ports.hidden_out)
            output = "token_embd" if self.spec.tied_output else "output"
            logits = self._times(self.b.weight(output), normed, rows)
            hidden = self._find_likeliest(self._place(logits, self.ports.logits))
        elif hidden:
            self._place(hidden, self.ports.hidden_out)
        if hidden:
            self._expand(hidden)

    def _layer(self, index: int, layer: int, hidden: int, ends_model: bool) -> int:
        """hidden: [hidden_size, rows]. Returns the same; where the model ends, of a chunk only the row that gets
        logits, or 0 if none are wanted: then keys and values are all that the layer is for."""
        api, ctx, spec, shape = self.api, self.ctx, self.spec, self.shape
        normed = self._norm(hidden, "attn_norm", layer)
        rows = shape.rows
        positions = self._integers(_POSITIONS, rows)
        self._write_cache(index, layer, normed, positions)
        if ends_model and not shape.logits:
            return 0
        queries = self._product("attn_q", layer, normed, rows)
        queries = self._rope(api.ggml_reshape_3d(ctx, queries, spec.head_dim, spec.heads, rows), positions)
        attended = self._product("attn_output", layer, self._attend(index, queries), rows)
        if ends_model and shape.is_chunk:
            rows, last = 1, self._integers(_LAST_ROW, 1)
            attended, hidden = api.ggml_get_rows(ctx, attended, last), api.ggml_get_rows(ctx, hidden, last)
        hidden = api.ggml_add(ctx, attended, hidden)
        normed = self._norm(hidden, "ffn_norm", layer)
        gate, up = (self._product(role, layer, normed, rows) for role in ("ffn_gate", "ffn_up"))
        down = self._product("ffn_down", layer, api.ggml_swiglu_split(ctx, gate, up), rows)
        return api.ggml_add(ctx, down, hidden)  # type: ignore[no-any-return]

    def _write_cache(self, index: int, layer: int, normed: int, positions: int) -> None:
        api, ctx, spec, cache = self.api, self.ctx, self.spec, self.b.cache
        rows = self.shape.rows
        cells = self._integers(_CELLS, rows)
        keys = self._product("attn_k", layer, normed, rows)
        keys = self._rope(api.ggml_reshape_3d(ctx, keys, spec.head_dim, spec.kv_heads, rows), positions)
        values = self._product("attn_v", layer, normed, rows)
        for store, new in ((cache.keys[index], keys), (cache.values[index], values)):
            head = 4 * spec.head_dim
            by_head = api.ggml_view_3d(ctx, new, spec.head_dim, rows, spec.kv_heads, head * spec.kv_heads, head, 0)
            self._expand(api.ggml_set_rows(ctx, store, by_head, cells))

    def _attend(self, index: int, queries: int) -> int:
        """queries: [head_dim, heads, rows]. Returns [heads * head_dim, rows], in the port that it always fills.

        A row of a decode step sees all that its slot holds, so it needs no mask unless the cells are padded.
        """
        api, ctx, spec, port = self.api, self.ctx, self.spec, self.ports.attended
        head, row = 4 * spec.head_dim, 4 * spec.head_dim * spec.heads
        rows = self.shape.rows
        per_run = rows if self.shape.is_chunk else 1
        self._expand(queries)
        runs = max(self.shape.runs, 1)
        views = self.views[2 * runs * index : 2 * runs * (index + 1)]
        for run, (keys, values) in enumerate(zip(views[:runs], views[runs:], strict=True)):
            query = api.ggml_view_3d(ctx, queries, spec.head_dim, per_run, spec.heads, row, head, run * row)
            if self.b.attention is not None:
                result = self._attend_by(self.b.attention, (query, keys, values), run, per_run)
            else:
                mask = self.masks[run] if self.masks else None
                result = api.ggml_flash_attn_ext(ctx, query, keys, values, mask, spec.head_dim**-0.5, 0.0, 0.0)
                api.ggml_flash_attn_ext_set_prec(result, _IN_F32)
            self._expand(self._place(result, port, run))
        return self._rows_of(port, rows)

    def _attend_by(self, attention: Attention, sources: tuple[int, int, int], first: int, rows: int) -> int:
        """The engine's own attention for `rows` rows, from the row `first` on."""
        shape = (self.spec.head_dim, self.spec.heads, rows)
        positions = self._integers(_POSITIONS, rows, first)
        return self._custom(TensorType.F32, shape, (*sources, positions), attention.function, attention.task)

    def _slot_view(self, cells: int) -> int:
        """Keys or values of slot 0 as [head_dim, stride, kv_heads]."""
        cache, dim = self.b.cache, self.spec.head_dim
        head_bytes = cache.cells * cache.cell_bytes
        view: int = self.api.ggml_view_3d(
            self.ctx, cells, dim, cache.stride, cache.kv_heads, cache.cell_bytes, head_bytes, 0
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
        product = self._times(self.b.weight(role, layer), vectors, rows)
        bias = f"{role}_bias"
        if bias in self.spec.family.tensors and (name := self.b.weight(bias, layer)) in self.b.weights:
            product = self.api.ggml_add(self.ctx, product, self.b.weights[name].plain)
        return product

    def _times(self, name: str, vectors: int, rows: int) -> int:
        """A matrix times each row. Decode steps of any number of rows use the same layout in exact mode."""
        weight = self.b.weights[name]
        if weight.panel is not None:
            return self._times_panel(weight.panel, vectors, rows)
        matrix = weight.matrix(rows)
        if self.b.exact and not self.shape.is_chunk:
            matrix = weight.packed or weight.plain
        product: int = self.api.ggml_mul_mat(self.ctx, matrix, vectors)
        return product

    def _times_panel(self, panel: Panel, vectors: int, rows: int) -> int:
        return self._custom(TensorType.F32, (panel.rows, rows, 1), (vectors,), panel.product, panel.task)

    def _find_likeliest(self, logits: int) -> int:
        """Have each row's largest logit looked for at once. Returns what ends the graph."""
        if self.b.largest is None or self.ports.likeliest is None:
            return logits
        self._expand(logits)
        rows = 1 if self.shape.is_chunk else self.shape.rows
        found = self._custom(TensorType.I32, (rows, 1, 1), (logits,), self.b.largest, None)
        return self._place(found, self.ports.likeliest)

    def _custom(
        self, kind: TensorType, shape: tuple[int, int, int], sources: tuple[int, ...], function: int, task: int | None
    ) -> int:
        """An operation of the engine's own. It is called in every thread, with the task's address."""
        array = (ctypes.c_void_p * len(sources))(*sources)
        result: int = self.api.ggml_custom_4d(
            self.ctx, int(kind), *shape, 1, array, len(array), function, _ALL_THREADS, task
        )
        return result

    def _rows_of(self, port: Port, rows: int, first: int = 0) -> int:
        view: int = self.api.ggml_view_2d(
            self.ctx, port.tensor, port.width, rows, port.row_bytes, first * port.row_bytes
        )
        return view

    def _integers(self, section: int, count: int, first: int = 0) -> int:
        offset = 4 * (section * self.ports.section(self.shape.rows) + first)
        view: int = self.api.ggml_view_1d(self.ctx, self.ports.integers.tensor, count, offset)
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
        backend, api = self.b.backend, self.api
        for index in range(api.ggml_graph_n_nodes(self.handle)):
            node = api.ggml_graph_node(self.handle, index)
            if not backend.supports(node):
                what, tensor = api.ggml_op_desc(node).decode(), Tensor.from_address(node)
                result = f"{api.ggml_type_name(tensor.type).decode()} {list(tensor.ne)}"
                raise UnsupportedModel(
                    f"device {backend.device.name} cannot compute {what} of {result}: its types, or a context and "
                    "slots of this size"
                )
