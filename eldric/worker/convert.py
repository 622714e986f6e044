"""Messages to the engine's dataclasses and back."""

import secrets

from eldric.engine.sampling import SamplingParams
from eldric.engine.schedule import Finish
from eldric.engine.stage import MemoryUse
from eldric.v1 import common_pb2, inference_pb2, sampling_pb2

FINISH_REASONS = {
    Finish.STOP: inference_pb2.STOP,
    Finish.LENGTH: inference_pb2.LENGTH,
    Finish.CANCELLED: inference_pb2.CANCELLED,
}


def sampling_params(message: sampling_pb2.SamplingParams) -> SamplingParams:
    """Absent fields take the engine's defaults. Raises InvalidSampling for a value out of range."""
    given = {field.name: value for field, value in message.ListFields() if field.name != "logit_bias"}
    params = SamplingParams(**given, logit_bias=dict(message.logit_bias))
    params.validate()
    return params


def with_seed(message: sampling_pb2.SamplingParams) -> sampling_pb2.SamplingParams:
    """A copy whose seed is set: a random one where the caller left it open."""
    copy = sampling_pb2.SamplingParams()
    copy.CopyFrom(message)
    if not copy.HasField("seed"):
        copy.seed = secrets.randbits(63)
    return copy


def memory_use(memory: MemoryUse) -> common_pb2.MemoryUse:
    return common_pb2.MemoryUse(
        mapped_bytes=memory.mapped,
        repacked_bytes=memory.repacked,
        kv_bytes=memory.kv,
        compute_bytes=memory.compute,
        locked_bytes=memory.locked,
    )
