"""The control side of a head: which generation a word about one concerns."""

import asyncio

import numpy as np
from prometheus_client import CollectorRegistry

from eldric.engine.schedule import Finish
from eldric.engine.schedule import Sequence as EngineSequence
from eldric.v1 import sampling_pb2
from eldric.worker.commands import Cancel, Command
from eldric.worker.generation import Ended, Generation
from eldric.worker.head import Head
from eldric.worker.metrics import WorkerMetrics


def generation(id: str) -> Generation:
    return Generation(EngineSequence(id, np.array([1], np.int32), 4), sampling_pb2.SamplingParams())


async def test_a_caller_that_leaves_ends_its_own_generation_and_not_the_next_of_the_same_id() -> None:
    head = Head("p", 8, 16, 4, WorkerMetrics(CollectorRegistry()))
    posted: list[Command] = []
    head.attach(posted.append)
    first, second = generation("r"), generation("r")
    head.submit(first)
    head.deliver([(first, Ended(Finish.STOP, 0))])
    await asyncio.sleep(0)  # the loop takes the news
    head.submit(second)
    head.drop(first)
    assert not any(isinstance(each, Cancel) for each in posted)
    head.drop(second)
    assert posted[-1] == Cancel(second)
