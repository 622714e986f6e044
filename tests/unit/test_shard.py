"""What stages need: tensors, exact byte ranges, memory."""

from pathlib import Path

import gguf
import pytest

from eldric.engine.errors import InvalidLayers
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import ByteRange, LayerRange, Shard, memory_estimate, model_costs, shard_of
from eldric.engine.spec import spec_of
from tests.models import SmallLlama, smollm2, storyteller, write_small_llama


def shard(path: Path, start: int, stop: int) -> Shard:
    with ModelFile.open(path) as model:
        return shard_of(model, spec_of(model), LayerRange(start, stop))


def outside_blocks(shard: Shard) -> set[str]:
    return {name for name in shard.tensors if not name.startswith("blk.")}


def test_head_middle_and_tail_hold_what_they_compute_with() -> None:
    head, middle, tail = (shard(storyteller(), *cut) for cut in ((0, 2), (2, 4), (4, 6)))
    assert (head.is_head, head.is_tail) == (True, False)
    assert (middle.is_head, middle.is_tail) == (False, False)
    assert (tail.is_head, tail.is_tail) == (False, True)
    assert outside_blocks(head) == {"token_embd.weight"}
    assert outside_blocks(middle) == set()
    assert outside_blocks(tail) == {"output_norm.weight", "output.weight"}
    assert {name.split(".")[1] for name in middle.tensors} == {"2", "3"}
    with ModelFile.open(storyteller()) as model:
        assert sorted([*head.tensors, *middle.tensors, *tail.tensors]) == sorted(model.tensors)


def test_tied_embedding_is_in_head_and_tail_and_once_in_a_stage_that_is_both() -> None:
    whole, head, tail = (shard(smollm2(), *cut) for cut in ((0, 30), (0, 3), (29, 30)))
    assert outside_blocks(head) == {"token_embd.weight"}
    assert outside_blocks(tail) == {"token_embd.weight", "output_norm.weight"}
    with ModelFile.open(smollm2()) as model:
        assert whole.nbytes == sum(info.nbytes for info in model.tensors.values())


def test_frequency_factors_are_in_every_stage(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", SmallLlama(layers=3, freq_factors=True))
    for layer in range(3):
        assert "rope_freqs.weight" in shard(path, layer, layer + 1).tensors


def test_optional_biases_go_with_their_layer(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", SmallLlama(qkv_bias=True, ffn_bias=True))
    names = set(shard(path, 1, 2).tensors)
    assert {"blk.1.attn_q.bias", "blk.1.ffn_down.bias"} <= names
    assert not any(name.startswith("blk.0.") for name in names)


@pytest.mark.parametrize("split_tensors", [0, 5], ids=["one file", "split set"])
def test_byte_ranges_hold_exactly_the_shards_tensors(tmp_path: Path, split_tensors: int) -> None:
    path = write_small_llama(
        tmp_path / "m.gguf", SmallLlama(layers=4, type="Q4_0", ffn=32), split_tensors=split_tensors
    )
    parts = sorted(tmp_path.glob("*.gguf"))
    data = {tensor.name: tensor.data.tobytes() for part in parts for tensor in gguf.GGUFReader(part).tensors}
    for start in range(4):
        for stop in range(start + 1, 5):
            part = shard(path, start, stop)
            mine = [bytearray(file.stat().st_size) for file in parts]  # what a stage that fetched them would have
            for span in part.ranges:
                with parts[span.file].open("rb") as file:
                    file.seek(span.offset)
                    mine[span.file][span.offset : span.offset + span.length] = file.read(span.length)
            for name, info in part.tensors.items():
                assert mine[info.file][info.offset : info.offset + info.nbytes] == data[name], name
            assert sum(span.length for span in part.ranges) == part.nbytes
            ends = [(span.file, span.offset + span.length) for span in part.ranges]
            starts = [(span.file, span.offset) for span in part.ranges]
            assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


def test_neighbours_make_one_range_and_padding_parts_two() -> None:
    middle, whole = shard(storyteller(), 1, 3), shard(storyteller(), 0, 6)
    assert middle.ranges == (ByteRange(0, min(info.offset for info in middle.tensors.values()), middle.nbytes),)
    embedding, rest = whole.ranges
    assert embedding.length == 228208 and rest.offset == embedding.offset + 228208 + 16


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2)])
def test_empty_or_negative_layer_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InvalidLayers, match=rf"\[{start}, {stop}\)"):
        LayerRange(start, stop)


def test_layer_range_outside_the_model_is_refused() -> None:
    with ModelFile.open(storyteller()) as model:
        spec = spec_of(model)
        costs = model_costs(model, spec)
        with pytest.raises(InvalidLayers, match="which has 6 layers"):
            shard_of(model, spec, LayerRange(5, 7))
        with pytest.raises(InvalidLayers, match="which has 6 layers"):
            costs.weights(LayerRange(6, 7))


@pytest.mark.parametrize(
    "shape",
    [SmallLlama(layers=4), SmallLlama(layers=4, tied=True, freq_factors=True, qkv_bias=True, type="Q8_0")],
    ids=["own output", "tied"],
)
def test_costs_add_up_to_every_shard(tmp_path: Path, shape: SmallLlama) -> None:
    path = write_small_llama(tmp_path / "m.gguf", shape)
    with ModelFile.open(path) as model:
        spec = spec_of(model)
        costs = model_costs(model, spec)
        for start in range(4):
            for stop in range(start + 1, 5):
                layers = LayerRange(start, stop)
                assert costs.weights(layers) == shard_of(model, spec, layers).nbytes


def test_costs_of_a_known_model() -> None:
    with ModelFile.open(smollm2()) as model:
        costs = model_costs(model, spec_of(model))
    assert costs.head_bytes == costs.shared_bytes == 49152 * 576 // 32 * 34  # Q8_0
    assert costs.tail_bytes == costs.head_bytes + 576 * 4
    assert costs.every_bytes == 0
    matrices = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
    assert costs.layer_bytes == (matrices // 32 * 20 + 2 * 576 * 4,) * 30  # Q4_1
    assert costs.kv_bytes_per_cell_per_layer == 2 * 192 * 2
    assert costs.logits_row_bytes == 49152 * 4


def test_memory_estimate_counts_cells_and_rows() -> None:
    with ModelFile.open(smollm2()) as model:
        costs = model_costs(model, spec_of(model))
    middle = memory_estimate(costs, LayerRange(10, 12), context=1000, slots=3, chunk=128)
    assert middle.weights == costs.weights(LayerRange(10, 12))
    assert middle.kv == 1024 * 3 * 2 * costs.kv_bytes_per_cell_per_layer
    assert middle.total == middle.weights + middle.kv + middle.compute
    tail = memory_estimate(costs, LayerRange(28, 30), context=1000, slots=3, chunk=128)
    assert tail.compute == middle.compute + 3 * costs.logits_row_bytes
    wide = memory_estimate(costs, LayerRange(10, 12), context=1000, slots=3, chunk=256, kv_value_bytes=4)
    assert wide.kv == 2 * middle.kv
    assert wide.compute == 2 * middle.compute
    many = memory_estimate(costs, LayerRange(10, 12), context=1000, slots=256, chunk=128)
    assert many.compute == wide.compute  # a decode step holds a row for each slot


def test_overlapping_tensors_are_covered_once(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", SmallLlama())
    data = bytearray(path.read_bytes())
    name = b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name) + 16  # its offset follows one dimension and the type
    data[at : at + 8] = bytes(8)  # now it lies inside token_embd, at the start of tensor data
    path.write_bytes(data)
    head = shard(path, 0, 1)
    embedding = head.tensors["token_embd.weight"]
    assert head.ranges[0].offset == embedding.offset == head.tensors[name.decode()].offset
    assert head.ranges[0].length >= embedding.nbytes
    assert sum(span.length for span in head.ranges) == head.nbytes - 256
