"""Compute threads: pinned where they are told to be, idle when there is nothing to do, gone when the stage is."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from eldric.engine.errors import LibraryError
from tests.models import storyteller
from tests.stages import Chain, random_prompt

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
Result = TypeVar("Result")
PROMPT = random_prompt(839, 40)


def in_a_thread(call: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def task_affinities() -> dict[int, set[int]]:
    return {int(task.name): os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()}


@linux
def test_the_computing_thread_is_pinned_and_no_other() -> None:
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    with Chain(storyteller(), cpus=(cpu,)) as chain:

        def work() -> set[int]:
            chain.prefill(0, PROMPT)
            return os.sched_getaffinity(0)

        assert in_a_thread(work) == {cpu}
        assert os.sched_getaffinity(0) == before


@linux
def test_pool_threads_are_pinned_one_to_a_cpu() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    before = task_affinities()
    with Chain(storyteller(), threads=2, cpus=tuple(cpus[:2])) as chain:

        def work() -> list[set[int]]:
            chain.prefill(0, PROMPT)
            return [cpus for task, cpus in task_affinities().items() if task not in before]

        found = in_a_thread(work)
        assert sorted(map(sorted, found)) == [[cpus[0]], [cpus[1]]]  # the pool's thread, and the one that computes
        assert os.sched_getaffinity(0) == before[threading.get_native_id()]


@linux
def test_idle_pool_takes_no_time_and_ends_with_the_stage() -> None:
    tasks = len(task_affinities())
    with Chain(storyteller(), threads=3) as chain:
        if len(task_affinities()) == tasks:
            pytest.skip("this ggml has its threads from OpenMP")
        chain.prefill(0, PROMPT)
        assert len(task_affinities()) == tasks + 2
        began = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - began < 0.02
    deadline = time.monotonic() + 5
    while len(task_affinities()) > tasks and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(task_affinities()) == tasks


def test_more_threads_give_close_logits() -> None:
    with Chain(storyteller()) as one, Chain(storyteller(), threads=2) as two:
        np.testing.assert_allclose(two.greedy(PROMPT, 4)[1], one.greedy(PROMPT, 4)[1], atol=0.05)


def test_steps_may_come_from_one_thread_after_another() -> None:
    with Chain(storyteller(), threads=2) as chain:
        expected = chain.prefill(0, PROMPT)
        np.testing.assert_array_equal(in_a_thread(lambda: chain.prefill(0, PROMPT)), expected)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 513}, {"cpus": ()}, {"cpus": (-1,)}, {"cpus": (512,)}])
def test_impossible_threads_and_cpus_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LibraryError):
        Chain(storyteller(), **options)


def test_unknown_device_is_refused() -> None:
    with pytest.raises(LibraryError, match="no device 'Quantum0'"):
        Chain(storyteller(), device="Quantum0")
