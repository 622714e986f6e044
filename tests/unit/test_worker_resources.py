"""How much memory a worker takes to be its own."""

from pathlib import Path

import psutil

from eldric.worker.resources import group_limits, machine_memory_bytes


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
