"""What a stage needs of a model: tensors, byte ranges, memory. Pure: nothing here reads a file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eldric.engine.errors import InvalidLayers
from eldric.engine.families.base import Place
from eldric.engine.gguf import ModelFile
from eldric.engine.spec import ModelSpec
from eldric.engine.tensors import TensorInfo

KV_PADDING = 256  # flash attention reads a slot's cells in such blocks
MASK_PADDING = 64  # rows of an attention mask


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Half-open range of layers [start, stop), in the model's own numbering.

    Raises InvalidLayers when it is empty or negative.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise InvalidLayers(f"the layer range {self} is empty or negative")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [offset, offset + length) of file number `file` of a split set."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one stage holds.

    ranges: exactly the bytes of the tensors, sorted, those that touch merged. nbytes: sum of the tensors' sizes.
    """

    layers: LayerRange
    is_head: bool
    is_tail: bool
    tensors: Mapping[str, TensorInfo]
    ranges: tuple[ByteRange, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What each part of a model takes, in bytes: all that a planner needs to know of it."""

    layer_bytes: tuple[int, ...]  # weights of each layer
    head_bytes: int  # token embedding
    tail_bytes: int  # output norm and output matrix, a tied embedding included
    shared_bytes: int  # of head_bytes and tail_bytes the same tensor: a stage that is both holds it once
    every_bytes: int  # what every stage holds besides
    kv_bytes_per_cell_per_layer: int  # keys and values of one position, in f16
    row_bytes: int  # activations of one row, at the most in any layer
    logits_row_bytes: int  # logits of one row, on the tail

    def weights(self, layers: LayerRange) -> int:
        """Bytes of a stage's weights. Raises InvalidLayers for a range outside the model."""
        is_head, is_tail = _ends(layers, len(self.layer_bytes))
        nbytes = self.every_bytes + sum(self.layer_bytes[layers.start : layers.stop])
        nbytes += self.head_bytes * is_head + self.tail_bytes * is_tail
        return nbytes - self.shared_bytes * (is_head and is_tail)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a stage takes."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


def shard_of(model: ModelFile, spec: ModelSpec, layers: LayerRange) -> Shard:
    """The tensors of a layer range, with those that head, tail and every stage need besides.

    spec: as spec_of gave it for this model. Raises InvalidLayers for a range outside the model.
    """
    is_head, is_tail = _ends(layers, spec.layers)
    tensors = {name: model.tensors[name] for name in _names(model, spec, layers, is_head, is_tail)}
    nbytes = sum(info.nbytes for info in tensors.values())
    return Shard(layers, is_head, is_tail, tensors, _byte_ranges(tensors.values()), nbytes)


def model_costs(model: ModelFile, spec: ModelSpec) -> ModelCosts:
    """Weigh each part of a model. spec: as spec_of gave it for this model."""
    by_place = {place: 0 for place in Place}
    layer_bytes = [0] * spec.layers
    for role in spec.family.tensors.values():
        for layer, name in enumerate(role.names(range(spec.layers))):
            info = model.tensors.get(name)
            if info is not None and role.place is Place.BLOCK:
                layer_bytes[layer] += info.nbytes
            elif info is not None:
                by_place[role.place] += info.nbytes
    shared_bytes = by_place[Place.HEAD] if spec.tied_output else 0
    sizes = spec.sizes
    return ModelCosts(
        layer_bytes=tuple(layer_bytes),
        head_bytes=by_place[Place.HEAD],
        tail_bytes=by_place[Place.TAIL] + shared_bytes,
        shared_bytes=shared_bytes,
        every_bytes=by_place[Place.EVERY],
        kv_bytes_per_cell_per_layer=2 * 2 * sizes["kv"],
        row_bytes=_row_bytes(spec),
        logits_row_bytes=4 * spec.vocab_size,
    )


def memory_estimate(
    costs: ModelCosts, layers: LayerRange, *, context: int, slots: int, chunk: int, kv_value_bytes: int = 2
) -> MemoryEstimate:
    """What a stage takes when its weights stay mapped.

    context: cells of a slot; slots: sequences at once; chunk: most rows of a prompt in one step; kv_value_bytes: 2
    for f16, 4 for f32. Compute counts the widest step: its activations, its attention mask (f16, a row for each
    query, a column for each cell) and, on the tail, a row of logits for each slot.
    Raises InvalidLayers for a range outside the model.
    """
    _, is_tail = _ends(layers, len(costs.layer_bytes))
    cells = _padded(context, KV_PADDING)
    cell_bytes = costs.kv_bytes_per_cell_per_layer * kv_value_bytes // 2
    rows = max(chunk, slots)
    compute = rows * costs.row_bytes + 2 * cells * _padded(rows, MASK_PADDING)
    if is_tail:
        compute += slots * costs.logits_row_bytes
    return MemoryEstimate(costs.weights(layers), cells * slots * len(layers) * cell_bytes, compute)


def _ends(layers: LayerRange, count: int) -> tuple[bool, bool]:
    """Whether a range begins the model, and whether it ends it."""
    if layers.stop > count:
        raise InvalidLayers(f"the layer range {layers} reaches outside the model, which has {count} layers")
    return layers.start == 0, layers.stop == count


def _names(model: ModelFile, spec: ModelSpec, layers: LayerRange, is_head: bool, is_tail: bool) -> list[str]:
    """The names of a stage's tensors; optional ones only where the file has them."""
    tied_tail = is_tail and spec.tied_output
    here = {Place.HEAD: is_head or tied_tail, Place.BLOCK: True, Place.TAIL: is_tail, Place.EVERY: True}
    roles = (role for role in spec.family.tensors.values() if here[role.place])
    return [name for role in roles for name in role.names(range(layers.start, layers.stop)) if name in model.tensors]


def _byte_ranges(tensors: Iterable[TensorInfo]) -> tuple[ByteRange, ...]:
    ranges: list[ByteRange] = []
    for info in sorted(tensors, key=lambda info: (info.file, info.offset)):
        last = ranges[-1] if ranges else None
        if last is None or last.file != info.file or last.offset + last.length < info.offset:
            ranges.append(ByteRange(info.file, info.offset, info.nbytes))
        else:
            stop = max(last.offset + last.length, info.offset + info.nbytes)
            ranges[-1] = ByteRange(last.file, last.offset, stop - last.offset)
    return tuple(ranges)


def _row_bytes(spec: ModelSpec) -> int:
    """Bytes of one row's activations, all F32, at the widest place of a layer, and of their quantized copy.

    Attention holds the residual, its norm and the output beside queries, keys and values before and after the
    rotation and what comes out; the feed-forward holds the residual and its norm beside gate, up and product.
    """
    hidden, q, kv, ffn = (spec.sizes[name] for name in ("hidden", "q", "kv", "ffn"))
    widest = max(3 * hidden + 3 * q + 3 * kv, 2 * hidden + 3 * ffn)
    return 4 * widest + 2 * max(hidden, q, ffn)


def _padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
