"""What a worker computes on, and how much memory it takes to be its own."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from eldric.config import NodeConfig
from eldric.engine.errors import LibraryError
from eldric.engine.ggml.library import Device, Library, find_library
from eldric.worker.config import WorkerConfig
from eldric.worker.resources import compute_device, group_limits, machine_memory_bytes, memory_budget

CONFIG = WorkerConfig(NodeConfig("worker", "w", Path(), controllers=("127.0.0.1:1",)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_limits_of_a_v2_group_and_of_those_above_it_count(tmp_path: Path) -> None:
    write(tmp_path / "system.slice" / "eldric.service" / "memory.max", "max\n")
    write(tmp_path / "system.slice" / "memory.max", "3000\n")
    write(tmp_path / "other.slice" / "memory.max", "10\n")
    assert group_limits("0::/system.slice/eldric.service\n", tmp_path) == [3000]


def test_the_limit_of_a_v1_group_is_that_of_the_memory_controller(tmp_path: Path) -> None:
    write(tmp_path / "memory" / "jobs" / "memory.limit_in_bytes", "5000\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "cpu" / "jobs" / "memory.limit_in_bytes", "1\n")
    groups = "4:memory:/jobs\n3:cpu,cpuacct:/jobs\n0::/\n"
    assert group_limits(groups, tmp_path) == [5000, 9223372036854771712]


def test_a_container_sees_its_limit_at_the_root_whatever_its_group_is_called(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", "7000\n")
    assert group_limits("0::/docker/0123abcd\n", tmp_path) == [7000]


def test_no_worker_has_more_than_the_machine() -> None:
    assert 0 < machine_memory_bytes() <= psutil.virtual_memory().total


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """The devices that the compute library finds: the CPU and others to be added."""
    found = [find_library().device("cpu")]
    monkeypatch.setattr(Library, "devices", lambda self, accelerators=True: tuple(found))
    return found


def graphics(name: str, kind: str, memory_bytes: int) -> Device:
    return Device(name, f"the {name}", kind, memory_bytes, memory_bytes, False, 1)


def test_stages_are_computed_on_the_first_graphics_device_that_has_memory_of_its_own(devices: list[Device]) -> None:
    assert compute_device(CONFIG).name == "CPU"
    devices.append(graphics("Vulkan0", "igpu", 1000))
    assert compute_device(CONFIG).name == "CPU"
    devices += [graphics("CUDA0", "gpu", 2000), graphics("CUDA1", "gpu", 3000)]
    assert compute_device(CONFIG).name == "CUDA0"
    assert compute_device(replace(CONFIG, device="cuda1")).name == "CUDA1"
    assert compute_device(replace(CONFIG, device="cpu")).name == "CPU"
    with pytest.raises(LibraryError, match="no device 'CUDA2', only CPU, Vulkan0, CUDA0, CUDA1"):
        compute_device(replace(CONFIG, device="CUDA2"))


def test_a_worker_has_the_memory_of_its_device_or_a_share_of_it_or_what_it_was_given(devices: list[Device]) -> None:
    assert memory_budget(CONFIG) == machine_memory_bytes()
    devices += [graphics("CUDA0", "gpu", 2000), graphics("Vulkan0", "igpu", 1000)]
    assert memory_budget(CONFIG) == 2000
    assert memory_budget(replace(CONFIG, memory_share=0.25)) == 500
    assert memory_budget(replace(CONFIG, memory_bytes=700, memory_share=0.25)) == 700
    assert memory_budget(replace(CONFIG, device="Vulkan0")) == machine_memory_bytes()
