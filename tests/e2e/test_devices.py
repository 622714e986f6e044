"""Workers that compute on a graphics device: Vulkan, on a software renderer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.devices import ENVIRONMENT, graphics_device
from tests.e2e.cli import Cli, ending
from tests.e2e.conftest import STORY, Cluster
from tests.models import storyteller

GREEDY = ("Once upon a time", "--raw", "--temperature", 0, "--max-tokens", 16, "--json")


@pytest.fixture
def mixed(home_cli: Cli, tmp_path: Path) -> Iterator[tuple[Cli, dict[str, Any]]]:
    """A cluster of two workers on the graphics device and one on the CPU: its `eldric-cli`, and its workers."""
    device = graphics_device()
    folder = tmp_path / "cluster"
    cli = replace(home_cli, environment={**ENVIRONMENT, "ELDRIC_DIR": str(folder)})
    with ending(folder):
        cli("up", "--workers", 3, "--device", f"{device},cpu", "--threads", 1)
        yield cli, {worker["name"]: worker for worker in cli("workers", "--json").json["workers"]}
        cli("down")


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_ring_of_graphics_devices_and_processors_gives_the_tokens_of_processors_and_learns_who_is_fast(
    mixed: tuple[Cli, dict[str, Any]], cluster: Cluster
) -> None:
    cli, workers = mixed
    assert [workers[f"worker-{number}"]["device"] for number in (1, 2, 3)] == ["Vulkan0", "CPU", "Vulkan0"]
    first, second, third = (workers[f"worker-{number}"]["memory_bytes"] for number in (1, 2, 3))
    assert first == third < second  # each the half of the device's; and all of the machine's
    cli("models", "add", storyteller(), "--name", STORY)
    cli("deploy", STORY, "--stages", 3, "--ctx", 512, "--slots", 2)
    expected = cluster.cli("run", STORY, *GREEDY).json["tokens"]
    assert [cli("run", STORY, *GREEDY).json["tokens"] for _ in range(2)] == [expected] * 2
    (pipeline,) = cli("status", "--json").json["pipelines"]
    assert {stage["worker"]: stage["layers"] for stage in pipeline["stages"]} == {
        "worker-1": [0, 2],
        "worker-2": [2, 4],
        "worker-3": [4, 6],
    }
    # The software renderer is a hundred times slower than the processor that it runs on.
    moved = cli("rebalance", STORY, "--json").json
    assert {stage["worker"]: stage["layers"][1] - stage["layers"][0] for stage in moved["pipeline"]["stages"]} == {
        "worker-1": 1,
        "worker-2": 4,
        "worker-3": 1,
    }
    assert cli("run", STORY, *GREEDY).json["tokens"] == expected


def test_a_device_that_is_not_there_is_said_with_those_that_are(home_cli: Cli, tmp_path: Path) -> None:
    done = home_cli("up", "--workers", 1, "--device", "Quantum0", "--dir", tmp_path / "cluster", code=1)
    assert "ggml has no device 'Quantum0', only CPU" in done.error
