"""Keeps the graphs that a stage has built, and their scratch memory."""

from eldric.engine.errors import OutOfMemory
from eldric.engine.ggml.builder import GraphBuilder
from eldric.engine.ggml.graph import Graph, GraphShape


class GraphCache:
    """Built graphs by shape. They share one scratch buffer, and the longest unused one goes when there are too many."""

    def __init__(self, builder: GraphBuilder, limit: int) -> None:
        self._builder, self._api, self._limit = builder, builder.api, limit
        self._allocator: int = builder.api.ggml_gallocr_new(builder.backend.buffer_type)
        self._graphs: dict[GraphShape, Graph] = {}  # from the longest unused to the last used
        self._last_shape: GraphShape | None = None
        self._last: Graph | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory and of all graphs' structs."""
        scratch: int = self._api.ggml_gallocr_get_buffer_size(self._allocator, 0)
        return scratch + sum(graph.nbytes for graph in self._graphs.values())

    def get(self, runs: int, rows: int, logits: bool) -> Graph:
        """The graph of GraphShape(runs, rows, logits). Raises OutOfMemory or UnsupportedModel."""
        if self._last is not None and (runs, rows, logits) == self._last_shape:
            return self._last
        shape = GraphShape(runs, rows, logits)
        graph = self._graphs.pop(shape, None) or self._make(shape)
        self._graphs[shape] = graph
        self._last_shape, self._last = shape, graph
        return graph

    def _make(self, shape: GraphShape) -> Graph:
        if len(self._graphs) >= self._limit:
            self._graphs.pop(next(iter(self._graphs))).close()
        plan = self._builder.build(shape)
        before = self._api.ggml_gallocr_get_buffer_size(self._allocator, 0)
        if not self._api.ggml_gallocr_alloc_graph(self._allocator, plan.handle):
            plan.arena.close()
            self._drop_all()  # the scratch buffer is gone
            raise OutOfMemory(f"no scratch memory for a step of {shape.rows} rows")
        if self._api.ggml_gallocr_get_buffer_size(self._allocator, 0) != before:
            self._drop_all()  # the scratch buffer moved, and the older graphs' tensors with it
        return plan.finish()

    def _drop_all(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._last = None

    def close(self) -> None:
        self._drop_all()
        if self._allocator:
            self._api.ggml_gallocr_free(self._allocator)
            self._allocator = 0
