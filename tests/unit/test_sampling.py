"""Choosing tokens: greedy, filters, penalties, reproducible draws, log-probabilities."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldric.engine.errors import EngineError, InvalidSampling
from eldric.engine.sampling import Logits, Sampled, Sampler, SamplingParams, candidates, uniform
from tests.sampler_reference import reference_distribution

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = SamplingParams(temperature=0.0)


# Computed with numpy's 64-bit arithmetic; the first round of seed 0 is splitmix64's known 0xe220a8397b1dcdaf.
UNIFORM = [0.6524484863740322, 0.03401170130434639, 0.36818951565166946, 0.6785045720544755, 0.6785045720544755]


def logits_of(*values: float) -> Logits:
    return np.array(values, np.float32)


def random_logits(size: int, seed: int = 0, scale: float = 2.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sample(logits: Logits, params: SamplingParams, position: int = 0, prompt: Sequence[int] = ()) -> Sampled:
    return Sampler(params, len(logits), prompt).sample(logits, position)


def draws(logits: Logits, params: SamplingParams, count: int, prompt: Sequence[int] = ()) -> Counter[int]:
    """How often each token comes, at `count` positions that have nothing to do with each other."""
    if params.penalizes:
        return Counter(sample(logits, params, position, prompt).token for position in range(count))
    sampler = Sampler(params, len(logits), prompt)
    return Counter(sampler.sample(logits, position).token for position in range(count))


def assert_distributed(counts: Counter[int], expected: dict[int, float]) -> None:
    """Chi-squared, five standard deviations wide; only tokens that are expected occur."""
    total = counts.total()
    assert set(counts) <= set(expected)
    common = {token: p for token, p in expected.items() if p * total >= 5}
    assert set(common) <= set(counts)
    chi_squared = sum((counts[token] - total * p) ** 2 / (total * p) for token, p in common.items())
    freedom = max(1, len(common) - 1)
    assert chi_squared <= freedom + 5 * math.sqrt(2 * freedom) + 5


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    assert sample(logits_of(0, 3, 1, 3), GREEDY) == Sampled(1, None, ())
    assert sample(logits_of(-5, -7, -5), GREEDY).token == 0
    assert sample(logits_of(0, 3, 1, 3), replace(PLAIN, top_k=1)).token == 1


@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_greedy_is_argmax_whatever_the_filters(size: int) -> None:
    logits = random_logits(size)
    for params in (GREEDY, replace(PLAIN, temperature=1e-9), replace(PLAIN, top_p=0.0), replace(PLAIN, min_p=1.0)):
        assert sample(logits, params, position=9).token == logits.argmax()


REFERENCE_CASES = {
    "plain": PLAIN,
    "default": SamplingParams(),
    "cold": replace(PLAIN, temperature=0.3),
    "hot": replace(PLAIN, temperature=3.0),
    "top_k": replace(PLAIN, top_k=5),
    "top_p": replace(PLAIN, top_p=0.6),
    "min_p": replace(PLAIN, min_p=0.1),
    "all filters": replace(PLAIN, top_k=12, top_p=0.7, min_p=0.2, temperature=2.0),
    "repetition": replace(PLAIN, top_k=8, repetition_penalty=1.5, penalty_last_n=4),
    "presence and frequency": replace(PLAIN, top_k=8, presence_penalty=1.5, frequency_penalty=0.75, penalty_last_n=8),
    "rewards": replace(PLAIN, top_p=0.8, repetition_penalty=0.7, frequency_penalty=-0.5),
    "bias": replace(PLAIN, top_k=6, logit_bias={3: 8.0, 5: -4.0}, repetition_penalty=1.2),
}
WITH_HISTORY = ("repetition", "presence and frequency", "rewards", "bias")


@pytest.mark.parametrize("params", REFERENCE_CASES.values(), ids=REFERENCE_CASES)
def test_draws_follow_the_distribution_of_llama_cpps_chain(params: SamplingParams) -> None:
    logits = random_logits(40, seed=3)
    best = np.argsort(-logits)
    history = [int(best[rank]) for rank in (0, 1, 0, 2, 30, 0, 35, 1, 4, 2)]
    expected = reference_distribution(logits, params, history)
    assert_distributed(draws(logits, params, 4000, history), expected)


@pytest.mark.parametrize("size", [64, 600, 20_000])
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("case", [case for case in REFERENCE_CASES if case not in WITH_HISTORY])
def test_the_filters_leave_what_llama_cpps_leave(case: str, scale: float, size: int) -> None:
    params = REFERENCE_CASES[case]
    logits = random_logits(size, seed=5, scale=scale)
    expected = reference_distribution(logits, params, ())
    left = candidates(logits, params, float(logits.max()))
    ours = set(range(size)) if left is None else set(left.tolist())
    # The reference adds up in single precision, so its top-p may end a few tokens sooner or later.
    assert len(ours ^ set(expected)) <= (len(expected) // 1000 if params.top_p < 1 else 0)
    edge = min(logits[token] for token in expected)
    assert all(abs(logits[token] - edge) < 1e-3 for token in ours ^ set(expected))


@pytest.mark.parametrize("size", [10, 700, 40_000])
def test_of_equal_logits_the_lower_ids_stay(size: int) -> None:
    logits = np.zeros(size, np.float32)
    logits[size // 2] = 1
    left = candidates(logits, replace(PLAIN, top_k=4), 1.0)
    assert left is not None and left.tolist() == [0, 1, 2, size // 2]
    half = candidates(logits, replace(PLAIN, top_p=0.5), 1.0)
    assert half is not None and half.tolist() == sorted({*range(len(half) - 1), size // 2})
    assert len(half) - 1 == math.ceil((size - 1 + math.e) / 2 - math.e)


def test_top_p_takes_no_more_tokens_than_it_needs() -> None:
    logits = np.log(logits_of(0.5, 0.25, 0.125, 0.125))
    for top_p, count in ((0.0, 1), (0.4999, 1), (0.5001, 2), (0.7499, 2), (0.7501, 3), (0.9999, 4)):
        left = candidates(logits, replace(PLAIN, top_p=top_p), float(logits.max()))
        assert left is not None and len(left) == count, top_p


def test_penalties_are_those_of_the_formulas() -> None:
    logits = logits_of(2.0, 2.0, -1.0, 0.5, 0.0)
    # Token 0 twice, 2 and 3 once each: 2/2 - 2*0.25 - 0.5 = 0; 2 stays; -1*2 - 0.75; 0.5/2 - 0.75; 0 stays.
    expected = np.exp([0.0, 2.0, -2.75, -0.5, 0.0])
    params = replace(PLAIN, repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    counts = draws(logits, params, 4000, prompt=[0, 2, 3, 0])
    assert_distributed(counts, dict(enumerate(expected / expected.sum())))


def test_penalties_forget_what_lies_before_the_window() -> None:
    logits = logits_of(1.0, 0.9, 0.8)
    greedy = replace(GREEDY, presence_penalty=1.0)
    assert sample(logits, replace(greedy, penalty_last_n=2), prompt=[0, 1]).token == 2
    assert sample(logits, replace(greedy, penalty_last_n=1), prompt=[0, 1]).token == 0
    assert sample(logits, replace(greedy, penalty_last_n=0), prompt=[0, 1]).token == 0
    assert sample(logits, replace(greedy, penalty_last_n=-1), prompt=[0, *[1] * 500]).token == 2


def test_generated_tokens_are_penalized_too() -> None:
    sampler = Sampler(replace(GREEDY, presence_penalty=0.5, penalty_last_n=2), 3, ())
    logits = logits_of(1.0, 0.9, 0.8)
    assert [sampler.sample(logits, position).token for position in range(5)] == [0, 1, 2, 0, 1]


def test_a_bias_forces_or_forbids_a_token() -> None:
    logits = logits_of(9.0, 1.0, 0.0, -9.0)
    assert sample(logits, replace(GREEDY, logit_bias={3: 100.0})).token == 3
    assert sample(logits, replace(GREEDY, logit_bias={0: -100.0})).token == 1
    assert set(draws(logits, replace(PLAIN, logit_bias={3: 100.0}), 200)) == {3}
    assert 0 not in draws(logits, replace(PLAIN, logit_bias={0: -100.0}), 2000)


def test_the_callers_logits_are_left_alone() -> None:
    logits = random_logits(1000)
    before = logits.copy()
    logits.flags.writeable = False
    for params in (*REFERENCE_CASES.values(), GREEDY, replace(PLAIN, logprobs=3)):
        sample(logits, params, prompt=[1, 2, 3])
    assert (logits == before).all()


@pytest.mark.parametrize("params", [*REFERENCE_CASES.values(), GREEDY], ids=[*REFERENCE_CASES, "greedy"])
def test_a_sampler_made_from_prompt_and_generated_tokens_goes_on_the_same(params: SamplingParams) -> None:
    rows = [random_logits(500, seed) for seed in range(60)]
    prompt = [5, 6, 7, 5]
    first = Sampler(params, 500, prompt)
    tokens = [first.sample(row, 4 + step).token for step, row in enumerate(rows)]
    for cut in (0, 1, 30, 59):
        second = Sampler(params, 500, prompt + tokens[:cut])
        again = [second.sample(row, 4 + step).token for step, row in enumerate(rows) if step >= cut]
        assert again == tokens[cut:]


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = random_logits(500)
    params = [replace(SamplingParams(), seed=seed) for seed in (1, 2)]
    drawn = [[sample(logits, each, position).token for position in range(50)] for each in params]
    backwards = Sampler(params[0], 500, ())
    assert [backwards.sample(logits, position).token for position in reversed(range(50))] == drawn[0][::-1]
    assert drawn[0] != drawn[1]


def test_the_random_numbers_are_the_same_on_every_machine() -> None:
    numbers = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 12345), uniform((1 << 64) - 1, 12345)]
    assert numbers == UNIFORM
    assert numbers[3] == numbers[4]


def test_the_random_numbers_are_uniform_and_independent() -> None:
    numbers = np.array([[uniform(seed, position) for position in range(2000)] for seed in range(20)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert ((counts - 625) ** 2 / 625).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert np.abs(np.corrcoef(numbers) - np.eye(20)).max() < 5 / math.sqrt(2000)
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(39980)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 32), st.integers(1, 2000), st.integers(0, 5), st.floats(0.1, 30))
def test_log_probabilities_are_those_of_the_models_own_logits(seed: int, size: int, count: int, scale: float) -> None:
    logits = random_logits(size, seed, scale)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    params = SamplingParams(
        temperature=5.0, repetition_penalty=1.3, logit_bias={0: 3.0}, logprobs=count, top_k=3, seed=seed
    )
    sampled = sample(logits, params, prompt=[0, 0])
    assert sampled.logprob == pytest.approx(exact[sampled.token], abs=1e-4)
    ids = [token for token, _ in sampled.top]
    assert ids == np.argsort(-logits, kind="stable")[:count].tolist()
    assert [value for _, value in sampled.top] == pytest.approx(exact[ids], abs=1e-4)


def test_tokens_without_any_probability_are_never_drawn() -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[[7, 1500, 2990]] = 0
    for params in (PLAIN, replace(PLAIN, top_p=0.99), replace(PLAIN, top_k=100), replace(PLAIN, temperature=100.0)):
        assert set(draws(logits, params, 300)) == {7, 1500, 2990}


@pytest.mark.parametrize("at", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_weight(at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eldric.engine.sampling.uniform", lambda seed, position: at)
    logits = np.full(2000, -np.inf, np.float32)
    logits[600:1400] = random_logits(800)
    for params in (PLAIN, SamplingParams(), replace(PLAIN, top_p=0.9), replace(PLAIN, top_k=1000)):
        assert 600 <= sample(logits, params).token < 1400


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    for params in (GREEDY, SamplingParams()):
        with pytest.raises(EngineError, match="the largest logit is"):
            sample(logits_of(1.0, value, 0.0), params)
    with pytest.raises(EngineError, match="the largest logit is -inf"):
        sample(np.full(4, -np.inf, np.float32), SamplingParams())


def test_logits_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(EngineError, match=r"shape \(3,\), expected \(4,\)"):
        Sampler(GREEDY, 4, ()).sample(logits_of(1, 2, 3), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", -101.0),
        ("penalty_last_n", -2),
        ("seed", 1 << 64),
        ("logprobs", 101),
        ("logprobs", -1),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: Any) -> None:
    params = replace(SamplingParams(), **{field: value})
    with pytest.raises(InvalidSampling, match=f"^{field} must be (a number|an integer) from .* to .*, not"):
        params.validate()
    with pytest.raises(InvalidSampling):
        Sampler(params, 10, ())


@pytest.mark.parametrize("bias", [{10: 1.0}, {-1: 1.0}, {3: 101.0}, {3: math.nan}])
def test_a_bias_out_of_range_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(InvalidSampling, match="logit_bias"):
        Sampler(replace(SamplingParams(), logit_bias=bias), 10, ())
