"""A stage on a graphics device computes what it computes on the CPU, within the device's own rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES, write_model
from tests.devices import ENVIRONMENT, graphics_device
from tests.models import SmallLlama, storyteller, write_small_llama

pytestmark = pytest.mark.timeout(160)

#: Of a row of logits, in units of their deviation. The CPU rounds activations to 8 bits before it multiplies, most
#: devices do not, so the two differ by the error of that.
TOLERANCE = 0.06


def differences(cases: list[tuple[Path, list[int]]], folder: Path) -> list[dict[str, float]]:
    listed = [{"path": str(path), "cuts": cuts, "device": graphics_device()} for path, cuts in cases]
    (folder / "cases.json").write_text(json.dumps(listed))
    command = [sys.executable, "-m", "tests.stage_on_device", str(folder / "cases.json")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def test_a_real_model_gives_the_same_logits_for_every_split(tmp_path: Path) -> None:
    found = differences([(storyteller(), cuts) for cuts in ([], [3], [1, 2, 5])], tmp_path)
    assert all(each[part] < TOLERANCE for each in found for part in each), found


def test_weights_of_every_type_give_the_same_logits(tmp_path: Path) -> None:
    quants = ("f32", "f16", "q8_0", "q4_0", "q4_k_m", "q2_k")
    paths = [write_model(tmp_path / f"{quant}.gguf", SHAPES["tiny"], quant) for quant in quants]
    found = dict(zip(quants, differences([(path, [2]) for path in paths], tmp_path), strict=True))
    assert all(each[part] < TOLERANCE for each in found.values() for part in each), found


def test_a_model_of_odd_sizes_gives_the_same_logits(tmp_path: Path) -> None:
    shape = SmallLlama(layers=3, hidden=96, heads=6, kv_heads=3, ffn=160, tied=True, qkv_bias=True, freq_factors=True)
    (found,) = differences([(write_small_llama(tmp_path / "odd.gguf", shape), [1])], tmp_path)
    assert all(each < 0.01 for each in found.values()), found  # in F32 on both
