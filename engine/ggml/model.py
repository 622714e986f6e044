"""A shard on a ggml device: weights, KV cache and graphs together, computing decode steps and chunks of prompts.

Nothing here checks its caller: Stage does.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldric.engine.ggml.backend import Backend
from eldric.engine.ggml.builder import GraphBuilder
from eldric.engine.ggml.graph import Graph
from eldric.engine.ggml.graph_cache import GraphCache
from eldric.engine.ggml.kv import KVCache
from eldric.engine.ggml.library import Library
from eldric.engine.ggml.mapping import Fetch
from eldric.engine.ggml.policy import PANELS, RowRange, decode_rows, exact_rows
from eldric.engine.ggml.ports import Ports
from eldric.engine.ggml.weights import Progress, Weights, WeightsMode
from eldric.engine.gguf import ModelFile
from eldric.engine.kernels.attending import Attention
from eldric.engine.kernels.panels import panel_bytes
from eldric.engine.shard import LayerRange, Shard, shard_of
from eldric.engine.spec import ModelSpec
from eldric.engine.step import Hidden, Run, Tokens
from eldric.engine.tensor_types import TensorType

Rows = NDArray[np.float32]

_GRAPHS_KEPT = 48
_CHUNK_MULTIPLE = 4  # a chunk's rows are padded to this: fewer graphs, and what interleaved matrices like


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a shard is laid out and run; StageConfig says what each means."""

    context: int
    slots: int
    chunk: int
    decode_rows: int  # most rows of one decode
    lanes: int  # decodes that share the slots when each stage has one to compute
    threads: int
    cpus: tuple[int, ...] | None
    device: str
    weights: WeightsMode
    kv_type: TensorType
    pack_budget_bytes: int | None
    exact: bool | None  # None: if no decode need be padded for it, or divided while they share the slots
    lock: bool


class GgmlModel:
    """Owns everything that a shard takes on its device; `close` gives it back."""

    def __init__(
        self,
        library: Library,
        model: ModelFile,
        spec: ModelSpec,
        shard: Shard,
        options: ModelOptions,
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
        fetch: Fetch | None = None,
    ) -> None:
        """Loads the weights and takes all memory.

        Raises LibraryError, ModelUnreadable, OutOfMemory, LoadCancelled or UnsupportedModel; all is given back then.
        """
        with ExitStack() as resources:
            self._backend = Backend(library, options.device, options.threads, options.cpus)
            resources.callback(self._backend.close)
            self._weights = Weights(self._backend, model, shard, fetch, options.lock)
            resources.callback(self._weights.close)
            matrices = _matrices(spec, shard)
            looked_up = spec.family.tensors["token_embd"].name if shard.is_head else None
            self._weights.place(options.weights, matrices, looked_up, options.pack_budget_bytes)
            used = [self._weights[name] for name in matrices]
            self._matrices = {(weight.info.type, weight.layout) for weight in used}
            self._exact_rows = self._exact_range()
            self._token_table = self._weights.token_table
            self._takes_ids = shard.is_head and self._token_table is None
            self._likeliest: NDArray[np.int32] | None = None
            self._final: Hidden | None = None
            self._take_memory(spec, shard, options, resources)
            in_panels = all(self._weights[name].layout == PANELS for name in _many_rows(spec, shard))
            self.cuts_freely = self._attention is not None and in_panels and _can_all_be_panels(model, spec)
            # All memory is taken by now: what does not fit is known before anything was read.
            self._weights.bring_in(progress, cancelled)
            self._resources = resources.pop_all()

    @property
    def mapped_bytes(self) -> int:
        return self._weights.mapped_bytes

    @property
    def locked_bytes(self) -> int:
        """Of the mapped bytes, those that cannot be evicted."""
        return self._weights.locked_bytes

    @property
    def copied_bytes(self) -> int:
        """Private copies of weights, whatever their layout."""
        return self._weights.packed_bytes + self._weights.copied_bytes

    @property
    def kv_bytes(self) -> int:
        return self._cache.nbytes

    @property
    def compute_bytes(self) -> int:
        attention = 0 if self._attention is None else self._attention.nbytes
        return self._graphs.nbytes + self._ports.nbytes + self._weights.scratch_bytes + attention

    @property
    def compute_ns(self) -> int:
        """Nanoseconds inside of ggml, in all steps so far."""
        return self._backend.compute_ns

    def likeliest(self) -> list[int] | None:
        """The token with the largest logit for each row of logits of the last step, NOT_A_NUMBER where a row has none.

        None if the device does not look for them, or there were no logits.
        """
        return None if self._likeliest is None else self._likeliest.tolist()

    def final(self) -> Hidden | None:
        """What the logits of the last step were made of: [rows of logits, hidden_size], behind the output norm.

        None if there were no logits.
        """
        if self._final is not None and not self._backend.is_host:
            self._ports.hidden_out.download(len(self._final))
        return self._final

    def exact_rows(self) -> int:
        """Most rows of a decode step in which each row gets the bits that it gets alone."""
        return self._exact_rows.most

    def decode(self, runs: Sequence[Run], tokens: Tokens | None, hidden: Hidden | None, logits: bool) -> Rows | None:
        """Runs of one row each.

        Returns hidden states [rows, hidden_size]; on the tail, logits [rows, vocab_size] if they are wanted.
        """
        rows, stride = len(runs), self._stride
        padded = self._padded_decode[rows]
        graph = self._graphs.get(rows, padded, logits)
        slots, positions, cells, lengths = [], [], [], []
        for slot, position, _, _ in runs:
            slots.append(slot)
            positions.append(position)
            cells.append(slot * stride + position)
            lengths.append(position + 1)
        if padded > rows:
            positions += self._no_ids[: padded - rows]
            cells += self._spare[: padded - rows]
        if self._backend.cell_multiple > 1:
            ends, lengths = lengths, [self._cells(length) for length in lengths]
            self._ports.write_row_masks(ends, lengths)
        ids = self._take_rows(graph.hidden_in, padded, tokens, hidden)
        graph.feed(ids, positions, cells, 0, lengths)
        graph.move(slots, self._slot_bytes)
        return self._compute(graph, self.exact)

    def run_chunk(self, run: Run, tokens: Tokens | None, hidden: Hidden | None, logits: bool) -> Rows | None:
        """One run of several rows.

        Returns hidden states [rows, hidden_size]; on the tail, logits [1, vocab_size] of the last row if wanted.
        """
        slot, position, rows, _ = run
        padded = self._padded_chunk[rows]
        graph = self._graphs.get(0, padded, logits)
        end, first = position + rows, slot * self._stride + position
        length = self._cells(end)
        if graph.is_masked:
            self._ports.write_causal_mask(position, padded, length)
        ids = self._take_rows(graph.hidden_in[:rows], padded, tokens, hidden)
        cells = [*range(first, first + rows), *self._spare[: padded - rows]]
        graph.feed(ids, list(range(position, position + padded)), cells, rows - 1, [length])
        graph.move([slot], self._slot_bytes)
        result = self._compute(graph, False)
        return None if result is None else result[:rows]

    def close(self) -> None:
        self._resources.close()

    def _take_memory(self, spec: ModelSpec, shard: Shard, options: ModelOptions, resources: ExitStack) -> None:
        """KV cache, ports and scratch: nothing is allocated in a step later on, graphs of new shapes aside."""
        decode = options.decode_rows
        # Where the bound is lower, a step is computed in parts, each of which reads all weights again.
        shared = min(decode, -(-options.slots // options.lanes))
        is_cheap = self._exact_rows.least == 1 and self._exact_rows.most >= shared
        self.exact = is_cheap if options.exact is None else options.exact
        if self.exact:
            decode = min(decode, self._exact_rows.most)
            self._padded_decode = [max(rows, self._exact_rows.least) for rows in range(decode + 1)]
        else:
            self._padded_decode = [decode_rows(self._matrices, rows) for rows in range(decode + 1)]
        self._padded_chunk = [-(-rows // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE for rows in range(options.chunk + 1)]
        rows = max(*self._padded_decode, *self._padded_chunk)
        self._weights.take_scratch(rows)
        self._cache = KVCache(
            self._backend,
            spec,
            shard.layers,
            slots=options.slots,
            context=options.context,
            spare=rows,
            kind=options.kv_type,
        )
        resources.callback(self._cache.close)
        self._ports = Ports(
            self._backend,
            rows=rows,
            hidden_size=spec.hidden_size,
            attention_size=spec.heads * spec.head_dim,
            context=self._cache.stride,
            views=2 * len(shard.layers) * decode,
            logit_rows=self._padded_decode[-1] if shard.is_tail else 0,
            vocab_size=spec.vocab_size,
        )
        resources.callback(self._ports.close)
        self._stride, self._slot_bytes = self._cache.stride, self._cache.slot_bytes
        self._spare = list(range(self._cache.first_spare, self._cache.first_spare + rows))
        self._no_ids = [0] * rows
        self._attention: Attention | None = None
        if options.weights == "auto" and self._backend.is_cpu and self._backend.is_host:
            self._attention = Attention.create(spec.head_dim, options.kv_type, options.threads)
        if self._attention is not None:
            resources.callback(self._attention.close)
        builder = GraphBuilder(
            self._backend, spec, shard, self._weights, self._cache, self._ports, self.exact, self._attention
        )
        self._graphs = GraphCache(builder, _GRAPHS_KEPT)
        resources.callback(self._graphs.close)
        # The widest first: they size the scratch buffer.
        self._graphs.get(0, self._padded_chunk[-1], shard.is_tail)
        self._graphs.get(decode, self._padded_decode[-1], shard.is_tail)

    def _cells(self, length: int) -> int:
        """How many cells are read for so many positions."""
        multiple = self._backend.cell_multiple
        return -(-length // multiple) * multiple

    def _exact_range(self) -> RowRange:
        if not self._backend.is_cpu:
            return RowRange(1, 1)
        ranges = [exact_rows(kind, layout) for kind, layout in self._matrices]
        return RowRange(max(least for least, _ in ranges), min(most for _, most in ranges))

    def _take_rows(self, target: Rows, padded: int, tokens: Tokens | None, hidden: Hidden | None) -> list[int]:
        """Bring hidden states, or looked up tokens, into the graph's input; return the ids that it looks up itself."""
        if tokens is None:
            target[...] = hidden
        elif self._token_table is not None:
            self._token_table.look_up(tokens.tolist(), target)
        else:
            return tokens.tolist() + self._no_ids[len(tokens) : padded]  # type: ignore[no-any-return]
        return self._no_ids[:padded]

    def _compute(self, graph: Graph, undivided: bool) -> Rows | None:
        result, self._likeliest, self._final = graph.result, graph.likeliest, graph.final
        if self._backend.is_host:
            self._backend.compute(graph.handle, undivided)
            return result
        self._ports.upload(graph.rows, 0 if self._takes_ids else graph.rows)
        self._backend.compute(graph.handle, undivided)
        if result is not None:
            self._ports.download(len(result))
        return result


def _can_all_be_panels(model: ModelFile, spec: ModelSpec) -> bool:
    """Whether the engine's own kernels can take every matrix of a model that a chunk is multiplied with."""
    whole = shard_of(model, spec, LayerRange(0, spec.layers))
    return all(panel_bytes(whole.tensors[name]) is not None for name in _many_rows(spec, whole))


def _matrices(spec: ModelSpec, shard: Shard) -> frozenset[str]:
    """The names of the tensors that the shard multiplies with."""
    embedding = spec.family.tensors["token_embd"].name
    names = {name for name, info in shard.tensors.items() if len(info.shape) == 2 and name != embedding}
    if shard.is_tail and spec.tied_output:
        names.add(embedding)
    return frozenset(names)


def _many_rows(spec: ModelSpec, shard: Shard) -> frozenset[str]:
    """Of these, those that all rows of a chunk are multiplied with: not the output matrix, which takes the last one."""
    return _matrices(spec, shard) - {spec.family.tensors["token_embd" if spec.tied_output else "output"].name}
