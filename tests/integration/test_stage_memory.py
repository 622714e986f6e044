"""A stage touches its own bytes only, holds what it says, and gives everything back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import Shape, write_model
from eldric.engine.errors import LoadCancelled, ModelUnreadable, OutOfMemory
from eldric.engine.ggml import mapping
from eldric.engine.ggml.backend import Backend
from eldric.engine.ggml.weights import Weights
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange
from eldric.engine.stage import MemoryUse, Stage, StageConfig
from tests.models import storyteller
from tests.stages import Chain, random_prompt

SHAPE = Shape(layers=8, hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=4096, context=512)
MIDDLE = LayerRange(2, 6)

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


def measure(path: Path, layers: LayerRange, weights: str, steps: int = 0) -> dict[str, Any]:
    arguments = [str(path), str(layers.start), str(layers.stop), weights, str(steps)]
    result = subprocess.run(
        [sys.executable, "-m", "tests.stage_memory", *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def config(layers: LayerRange, **options: Any) -> StageConfig:
    return StageConfig(layers, context=64, slots=2, chunk=16, lane_slots=2, **options)


@pytest.fixture(scope="module")
def q8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "q8_0.gguf", SHAPE, "q8_0")


@linux
@pytest.mark.parametrize("layers", [LayerRange(0, 2), MIDDLE, LayerRange(6, 8)], ids=str)
def test_resident_file_pages_are_those_of_the_shard(q8_model: Path, layers: LayerRange) -> None:
    found = measure(q8_model, layers, "mapped")
    assert found["shard"] < q8_model.stat().st_size * 0.6
    assert found["shard"] <= found["file_rss"] <= found["shard"] * 1.02
    assert found["file_mapped"] <= found["shard"] * 1.02
    assert found["memory"]["mapped"] == found["shard"]
    assert found["memory"]["repacked"] == 0


@linux
def test_pages_of_what_was_packed_are_let_go(q8_model: Path, tmp_path: Path) -> None:
    """With private copies, weights are held once: copies and resident file pages together are the shard."""
    path = write_model(tmp_path / "q4_0.gguf", SHAPE, "q4_0")
    found = measure(path, MIDDLE, "auto")
    if not found["memory"]["repacked"]:
        pytest.skip("this CPU variant packs nothing")
    assert found["file_rss"] + found["memory"]["repacked"] <= found["shard"] * 1.1
    assert found["file_rss"] <= found["shard"] * 0.1


@linux
@pytest.mark.parametrize("weights", ["mapped", "auto"])
def test_close_gives_memory_back_and_steps_leak_nothing(tmp_path: Path, weights: str) -> None:
    shape = Shape(layers=4, hidden=256, heads=8, kv_heads=2, ffn=512, vocab=512, context=512)
    path = write_model(tmp_path / "q4_0.gguf", shape, "q4_0")
    found = measure(path, LayerRange(2, 4), weights, steps=2000)
    held = found["memory"]["kv"] + found["memory"]["repacked"]
    assert found["at_work"] - found["before"] >= held
    assert abs(found["after_steps"] - found["at_work"]) < 256 << 10
    assert found["new_objects"] < 50
    assert found["closed"] - found["before"] < 1 << 20
    assert found["file_mapped_closed"] == 0


def test_progress_reaches_the_shards_bytes_and_never_goes_back(q8_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_PIECE_BYTES", 100_000)
    seen: list[tuple[int, int]] = []
    with ModelFile.open(q8_model) as model:
        stage = Stage.load(model, config(MIDDLE), lambda done, total: seen.append((done, total)))
    with stage:
        assert {total for _, total in seen} == {stage.shard.nbytes}
        done = [count for count, _ in seen]
        assert done == sorted(done) and done[-1] == stage.shard.nbytes and len(done) > 50


def test_cancelled_load_gives_everything_back(q8_model: Path) -> None:
    calls = iter([False, False, True])
    with ModelFile.open(q8_model) as model, pytest.raises(LoadCancelled, match="was cancelled after"):
        Stage.load(model, config(MIDDLE), cancelled=lambda: next(calls))
    if Path("/proc/self/maps").exists():
        assert str(q8_model) not in Path("/proc/self/maps").read_text()


def test_stage_outlives_its_model_file_object(q8_model: Path) -> None:
    with Chain(q8_model) as chain:  # closes the ModelFile
        assert chain.greedy(random_prompt(SHAPE.vocab, 8), 2)[0]


@pytest.mark.parametrize("weights", ["mapped", "auto"])
def test_file_that_shrank_is_an_error_and_not_a_crash(q8_model: Path, tmp_path: Path, weights: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(q8_model.read_bytes())
    with ModelFile.open(path) as model:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(ModelUnreadable, match=r"model\.gguf"):
            Stage.load(model, config(LayerRange(0, 8), weights=weights))


def test_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(q8_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(q8_model.read_bytes())

    def cut(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.truncate(total // 4)

    with ModelFile.open(path) as model, pytest.raises(ModelUnreadable, match=r"model\.gguf at byte"):
        Stage.load(model, config(LayerRange(0, 8), weights="mapped"), progress=cut)


def test_file_that_is_gone_is_an_error(q8_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(q8_model.read_bytes())
    with ModelFile.open(path) as model:
        path.unlink()
        with pytest.raises(ModelUnreadable, match="No such file"):
            Stage.load(model, config(MIDDLE))


def test_kernel_without_populate_reads_instead(q8_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(SHAPE.vocab, 20)
    with Chain(q8_model) as chain:
        expected = chain.prefill(0, prompt)
    monkeypatch.setattr(mapping, "_POPULATE_READ", 9999)  # EINVAL
    with Chain(q8_model) as chain:
        assert (chain.prefill(0, prompt) == expected).all()


def test_packing_stays_within_its_budget(tmp_path: Path) -> None:
    path = write_model(tmp_path / "q4_0.gguf", SHAPE, "q4_0")
    with Chain(path) as chain:
        everything = chain.stages[0].memory.repacked
    if not everything:
        pytest.skip("this CPU variant packs nothing")
    prompt = random_prompt(SHAPE.vocab, 20)
    with Chain(path, weights="mapped") as chain:
        assert chain.stages[0].memory.repacked == 0
        expected = chain.prefill(0, prompt)
    for budget in (0, everything // 2):
        with Chain(path, repack_budget_bytes=budget) as chain:
            memory = chain.stages[0].memory
            assert memory.repacked <= budget and memory.repacked >= budget * 0.8
            assert abs(chain.prefill(0, prompt) - expected).max() < 0.2


def test_kv_cache_that_cannot_be_had_says_how_much(q8_model: Path) -> None:
    sizes = StageConfig(MIDDLE, context=1 << 26, slots=1 << 16, chunk=16, lane_slots=2)
    with (
        ModelFile.open(q8_model) as model,
        pytest.raises(OutOfMemory, match="KV cache of 65536 slots of 67108864 cells"),
    ):
        Stage.load(model, sizes)


def test_memory_adds_up() -> None:
    with Chain(storyteller(), slots=4, context=640) as chain:
        memory = chain.stages[0].memory
        assert memory.total == memory.mapped + memory.repacked + memory.kv + memory.compute
        cell_bytes = 2 * 2 * 6 * 4 * 32
        assert 4 * 640 * cell_bytes <= memory.kv < (4 * 640 + 64) * cell_bytes
    assert MemoryUse(1, 2, 3, 4).total == 10


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "f16", "bf16", "f32"])
def test_what_a_gpu_would_take_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    """Weights copied in, tokens looked up beside, whole blocks of keys behind masks, inputs and outputs carried to and
    fro: all of it on the CPU's own buffers, which alone give the same bits. test_stage_device.py takes a real device.
    """
    shape = Shape(layers=2, hidden=256, heads=8, kv_heads=2, ffn=512, vocab=320, context=512)
    path = write_model(tmp_path / "model.gguf", shape, quant)
    prompt = random_prompt(shape.vocab, 250)
    with Chain(path, weights="mapped") as chain:
        expected = chain.greedy(prompt, 8)[1]
        chain.prefill(1, prompt[:30])
        both = chain.decode({0: (250, 7), 1: (30, 8)})
    make = Backend.__init__

    def far_away(self: Backend, *arguments: Any) -> None:
        make(self, *arguments)
        self.is_host = self.can_map = False
        self.cell_multiple = 256

    monkeypatch.setattr(Backend, "__init__", far_away)
    monkeypatch.setattr(Weights, "_can_look_up", lambda self, info: False)
    with Chain(path, weights="mapped") as chain:
        assert (chain.greedy(prompt, 8)[1] == expected).all()
        chain.prefill(1, prompt[:30])
        again = chain.decode({0: (250, 7), 1: (30, 8)})
        assert all((again[slot] == both[slot]).all() for slot in both)
        embedding = chain.stages[0].shard.tensors["token_embd.weight"]
        assert chain.stages[0].memory.mapped == embedding.nbytes  # of which rows are read in the file
