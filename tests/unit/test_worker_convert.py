"""Sampling parameters as messages and as the engine's own."""

import dataclasses

import pytest

from eldric.engine.errors import InvalidSampling
from eldric.engine.sampling import SamplingParams
from eldric.v1 import sampling_pb2
from eldric.worker.convert import sampling_params, with_seed


def test_absent_fields_are_the_engines_defaults() -> None:
    assert sampling_params(sampling_pb2.SamplingParams()) == SamplingParams()


def test_every_field_of_the_message_is_one_of_the_engines() -> None:
    names = {field.name for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}


def test_given_fields_come_through_zeros_included() -> None:
    message = sampling_pb2.SamplingParams(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        penalty_last_n=-1,
        logit_bias={3: -100.0},
        seed=2**64 - 1,
        logprobs=0,
    )
    assert sampling_params(message) == SamplingParams(0.0, 0, 1.0, 0.0, 1.5, -0.5, 0.25, -1, {3: -100.0}, 2**64 - 1, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("logprobs", 1000),
        ("penalty_last_n", -2),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: float) -> None:
    message = sampling_pb2.SamplingParams()
    setattr(message, field, value)
    with pytest.raises(InvalidSampling, match=field):
        sampling_params(message)


def test_a_seed_is_drawn_where_none_is_given_and_kept_where_one_is() -> None:
    asked = sampling_pb2.SamplingParams(temperature=0.5)
    seeds = {with_seed(asked).seed for _ in range(4)}
    assert len(seeds) == 4 and not asked.HasField("seed")
    assert with_seed(asked).temperature == 0.5
    assert with_seed(sampling_pb2.SamplingParams(seed=0)).seed == 0
