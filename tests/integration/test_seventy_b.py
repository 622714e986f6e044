"""A model of 42 GB, from its header to a plan and to stages, on a machine that could not hold it.

Its file is sparse: the header is that of a real one, the weights are a hole (`python -m benchmarks.seventy_b` loads
every stage of a plan whole).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import planned_stage, seventy_b
from benchmarks.shapes import SHAPES, write_model
from eldric.controller.costs import ModelShape, Options
from eldric.controller.planner import Order, plan
from eldric.controller.seating import WorkerView
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, memory_estimate, model_costs
from eldric.engine.spec import spec_of
from eldric.engine.tokenizer import Tokenizer

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = write_model(tmp_path_factory.mktemp("models") / "70b.gguf", SHAPES["70b"], "q4_k_m", sparse=True)
    yield made
    made.unlink()


def test_sparse_file_is_as_long_as_a_real_one_and_takes_no_disk(path: Path) -> None:
    status = path.stat()
    assert 42e9 < status.st_size < 43e9
    assert status.st_blocks * 512 < 10e6


def test_header_to_plan_takes_less_than_a_second(path: Path) -> None:
    workers = [WorkerView(f"worker-{number}", size * 10**9) for number, size in enumerate((24, 16, 24), 1)]
    began = time.perf_counter()
    with ModelFile.open(path) as model:
        spec = spec_of(model)
        shape = ModelShape("llama-70b", model_costs(model, spec), spec.context_length)
    made = plan(workers, shape, Order(Options(context=4096, weights="mapped")))
    assert time.perf_counter() - began < 1.0
    assert made.stages[0].start == 0 and made.stages[-1].end == 80
    assert [stage.end for stage in made.stages[:-1]] == [stage.start for stage in made.stages[1:]]
    assert {stage.worker: stage.needed_bytes <= stage.available_bytes for stage in made.stages} == {
        "worker-1": True,
        "worker-2": True,
        "worker-3": True,
    }
    small = min(made.stages, key=lambda stage: stage.end - stage.start)
    assert small.worker == "worker-2"
    weights = sum(stage.weights_bytes for stage in made.stages)
    assert path.stat().st_size * 0.99 < weights < path.stat().st_size * 1.01


@linux
@pytest.mark.parametrize("layers", [LayerRange(0, 1), LayerRange(40, 41), LayerRange(79, 80)], ids=str)
def test_stage_takes_what_is_planned_and_maps_its_own_bytes_only(path: Path, layers: LayerRange) -> None:
    with ModelFile.open(path) as model:
        costs = model_costs(model, spec_of(model))
    planned = memory_estimate(costs, layers, context=4096, slots=4, chunk=64)
    found = planned_stage.measure(path, layers.start, layers.stop, context=4096, slots=4, chunk=64)
    real = found["memory"]
    assert real["mapped"] == found["shard_bytes"] == planned.weights
    assert planned.weights <= found["mapped_bytes"] <= planned.weights * 1.02
    assert planned.weights <= found["resident_bytes"] <= planned.weights * 1.02
    assert abs(sum(real.values()) - planned.total) <= planned.total * 0.02
    # The kernel's word for what lies beside the file, with what a process takes once and for all.
    assert planned.kv <= found["private_bytes"] <= planned.kv + planned.compute + (20 << 20)


def test_vocabulary_of_128k_tokens_takes_prompts(path: Path) -> None:
    with ModelFile.open(path) as model:
        tokenizer = Tokenizer.from_metadata(model.metadata)
    assert tokenizer.vocab_size == 128_256
    text = "Where do the layers go? Übermut, 42 GB."
    ids = tokenizer.encode(text, special=False, add_bos=False)
    assert len(ids) < len(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_deploy_dry_run_plans_it_over_workers_of_24_and_16_gb(tmp_path: Path) -> None:
    local = seventy_b.make_cluster(tmp_path / "cluster")
    try:
        local.up(lambda line: None)
        document, _ = seventy_b.dry_run(local.folder)
    finally:
        local.down(lambda line: None)
    stages = document["plan"]["stages"]
    assert [stage["worker"] for stage in stages] == ["worker-1", "worker-2", "worker-3"]
    assert stages[0]["layers"][0] == 0 and stages[-1]["layers"][1] == 80
    for stage, memory in zip(stages, (24e9, 16e9, 24e9), strict=True):
        needed = stage["weights_bytes"] + stage["kv_bytes"] + stage["compute_bytes"]
        assert needed <= stage["available_bytes"] <= memory
