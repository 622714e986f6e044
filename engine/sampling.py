"""From a row of logits to the next token.

The order is that of llama.cpp's default chain: logit bias, penalties, top-k, top-p, min-p, temperature, draw. A draw is
a pure function of (seed, position), so a sequence that is continued elsewhere continues with the same tokens.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import EngineError, InvalidSampling

Logits = NDArray[np.float32]
Tokens = NDArray[np.intp]

MAX_LOGPROBS = 100
_WORD = (1 << 64) - 1
_COLDEST = 1e-6  # below this temperature the most likely token is as good as certain
_GROUPS = 64  # the vocabulary is searched for its best tokens in so many interleaved groups
_BLOCK = 512  # weights are summed by blocks first, because cumulating them all takes longer
_TOP_P_TRY = 256  # tokens in which top-p looks before it sorts the vocabulary


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; the defaults are llama.cpp's.

    temperature: 0 takes the most likely token, the lowest id among equals. top_k, min_p: 0 is off; top_p: 1 is off.
    repetition_penalty divides positive logits and multiplies negative ones of the tokens among the last
    `penalty_last_n` (-1: all), prompt included; presence_penalty is taken off once for each of them, frequency_penalty
    as often as it is there. logit_bias: what is added, by token id. seed: 64 bits. logprobs: None for none, else how
    many of the likeliest tokens to report.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None

    def validate(self) -> None:
        """Raises InvalidSampling, naming the first field that is out of its range."""
        _check_number("temperature", self.temperature, 0, 100)
        _check_integer("top_k", self.top_k, 0, 1 << 31)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("presence_penalty", self.presence_penalty, -100, 100)
        _check_number("frequency_penalty", self.frequency_penalty, -100, 100)
        _check_integer("penalty_last_n", self.penalty_last_n, -1, 1 << 31)
        _check_integer("seed", self.seed, -(1 << 63), _WORD)
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias token", token, 0, 1 << 31)
            _check_number(f"logit_bias[{token}]", bias, -100, 100)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.penalty_last_n != 0 and penalties != (1, 0, 0)


class Sampled(NamedTuple):
    """A chosen token. logprob, top: natural logarithms of probabilities under the model's own logits, before bias,
    penalties, filters and temperature (as llama.cpp's server and OpenAI's API report them); `top` has the likeliest
    tokens, best first. Without SamplingParams.logprobs they are None and empty.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses one sequence's tokens. It remembers what the penalties need, and nothing else: a sampler made from
    prompt and generated tokens goes on exactly as the one that generated them.
    """

    __slots__ = ("_adjusts", "_bias", "_counts", "_greedy", "_params", "_recent", "_vocab_size", "takes_likeliest")

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_tokens: Sequence[int]) -> None:
        """Raises InvalidSampling for a parameter out of range or a biased token outside the vocabulary."""
        params.validate()
        for token in params.logit_bias:
            _check_integer("logit_bias token", token, 0, vocab_size - 1)
        self._params, self._vocab_size = params, vocab_size
        self._bias = (
            np.fromiter(params.logit_bias.keys(), np.intp),
            np.fromiter(params.logit_bias.values(), np.float32),
        )
        self._adjusts = bool(params.logit_bias) or params.penalizes
        self._greedy = params.greedy
        #: Whether it chooses the token with the largest of the model's own logits, and nothing else is asked of it.
        self.takes_likeliest = params.greedy and not self._adjusts and params.logprobs is None
        self._recent: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        if params.penalizes:
            window = len(prompt_tokens) if params.penalty_last_n < 0 else params.penalty_last_n
            for token in islice(prompt_tokens, max(0, len(prompt_tokens) - window), None):
                self._remember(token)

    def sample(self, logits: Logits, position: int) -> Sampled:
        """Choose the token for `position`, its absolute index in the sequence. logits: [vocab_size], left unchanged.
        Raises EngineError if the logits are not numbers.
        """
        if len(logits) != self._vocab_size:
            raise EngineError(f"logits have shape {logits.shape}, expected ({self._vocab_size},)")
        params = self._params
        adjusted = self._adjust(logits) if self._adjusts else logits
        token = int(adjusted.argmax())
        largest: float = adjusted.item(token)
        if largest - largest != 0:  # infinite or not a number, which argmax finds; cheaper than a call
            raise EngineError(f"the model's output is no number: the largest logit is {largest}")
        if self.takes_likeliest:
            return Sampled(token, None, ())
        if not self._greedy:
            token = _draw(adjusted, params, largest, uniform(params.seed, position))
        if params.penalizes:
            self._remember(token)
        if params.logprobs is None:
            return Sampled(token, None, ())
        return _with_logprobs(logits, token, params.logprobs)

    def _remember(self, token: int) -> None:
        self._recent.append(token)
        self._counts[token] += 1
        if 0 <= self._params.penalty_last_n < len(self._recent):
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def _adjust(self, logits: Logits) -> Logits:
        """The logits with bias and penalties, in a buffer that the next call overwrites."""
        adjusted, params = _buffers.get("adjusted", self._vocab_size), self._params
        np.copyto(adjusted, logits)
        tokens, bias = self._bias
        adjusted[tokens] += bias
        if self._counts:
            seen = np.fromiter(self._counts.keys(), np.intp, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            values, penalty = adjusted[seen], np.float32(params.repetition_penalty)
            values = np.where(values <= 0, values * penalty, values / penalty)
            taken_off = counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
            adjusted[seen] = values - taken_off
        return adjusted


class _Buffers(threading.local):
    """Each thread's arrays of the vocabulary's size: allocating them anew takes longer than filling them."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], Logits] = {}

    def get(self, name: str, size: int) -> Logits:
        if (name, size) not in self._arrays:
            self._arrays[name, size] = np.empty(size, np.float32)
        return self._arrays[name, size]


_buffers = _Buffers()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: two rounds of splitmix64 over them.
    (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014.)
    """
    mixed = _mix(_mix(seed & _WORD) ^ (position & _WORD))
    return (mixed >> 11) / (1 << 53)


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _draw(logits: Logits, params: SamplingParams, largest: float, at: float) -> int:
    """The token whose share of the probabilities, added up in the order of the ids, covers `at`, in [0, 1)."""
    tokens = candidates(logits, params, largest)
    if tokens is None:
        weights = _weights(logits, largest, params.temperature)
        return _reach(weights, at * float(weights.sum(dtype=np.float64)), "right")
    few_weights = np.exp((logits[tokens].astype(np.float64) - largest) / params.temperature)
    return int(tokens[_reach(few_weights, at * float(few_weights.sum()), "right")])


def candidates(logits: Logits, params: SamplingParams, largest: float) -> Tokens | None:
    """The ids that top-k, top-p and min-p leave, ascending; None for the whole vocabulary. largest: the largest logit.
    Of equal logits at the edge of what top-k or top-p leave, the lower ids stay.
    """
    tokens: Tokens | None = None
    if 0 < params.top_k < len(logits):
        tokens = _best(logits, params.top_k)
    if params.top_p < 1:
        tokens = _nucleus(logits, tokens, params.top_p, largest)
    if params.min_p > 0:
        floor = largest + math.log(params.min_p)
        tokens = np.flatnonzero(logits >= floor) if tokens is None else tokens[logits[tokens] >= floor]
    return tokens


def _nucleus(logits: Logits, tokens: Tokens | None, top_p: float, largest: float) -> Tokens:
    """The fewest best tokens that have `top_p` of the probability of `tokens`, or of all."""
    if tokens is not None:
        values = logits[tokens]
        weights = np.exp(np.sort(values)[::-1].astype(np.float64) - largest)
        return tokens[_best(values, 1 + _reach(weights, top_p * float(weights.sum()), "left"))]
    wanted = top_p * float(_weights(logits, largest).sum(dtype=np.float64))
    few = _best(logits, _TOP_P_TRY)
    weights = np.exp(np.sort(logits[few])[::-1].astype(np.float64) - largest)
    if weights.sum() >= wanted:
        return few[_best(logits[few], 1 + _reach(weights, wanted, "left"))]
    return _best(logits, 1 + _reach(_weights(np.sort(logits)[::-1], largest), wanted, "left"))


def _weights(logits: Logits, largest: float, temperature: float = 1.0) -> Logits:
    """The probabilities times a constant, in a buffer that the next call overwrites."""
    weights = _buffers.get("weights", len(logits))
    np.subtract(logits, np.float32(largest), out=weights)
    if temperature != 1:
        np.divide(weights, np.float32(temperature), out=weights)
    return np.exp(weights, out=weights)


def _reach(weights: NDArray[Any], target: float, side: Literal["left", "right"]) -> int:
    """The first index up to which the weights add up to `target` (side "left") or to more (side "right")."""
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    block = min(int(np.searchsorted(blocks, target, side)), int(np.searchsorted(blocks, blocks[-1])))
    before = blocks[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    # Rounding may leave the target just above the sum: then it is the last index that has weight.
    index = min(int(np.searchsorted(inside, target, side)), int(np.searchsorted(inside, inside[-1])))
    return block * _BLOCK + index


def _best(values: Logits, count: int) -> Tokens:
    """The indices of the `count` largest values, ascending; the first ones among equals."""
    if count >= len(values):
        return np.arange(len(values))
    floor = _smallest_of_best(values, count)
    best = np.flatnonzero(values >= floor)
    if len(best) > count:
        equal = np.flatnonzero(values[best] == floor)
        best = np.delete(best, equal[count - len(best) :])
    return best


def _smallest_of_best(values: Logits, count: int) -> np.float32:
    """The value at place `count` from the largest. The maxima of groups tell which few values need a look."""
    width = len(values) // _GROUPS
    if count <= width:
        maxima = values[: width * _GROUPS].reshape(_GROUPS, width).max(axis=0)
        values = values[values >= np.partition(maxima, width - count)[width - count]]
    return np.float32(np.partition(values, len(values) - count)[len(values) - count])


def _with_logprobs(logits: Logits, token: int, count: int) -> Sampled:
    best = _best(logits, max(1, count))
    best = best[np.argsort(-logits[best], kind="stable")]
    largest = logits[best[0]]
    normalizer = float(largest) + math.log(_weights(logits, float(largest)).sum(dtype=np.float64))
    top = tuple((int(i), float(logits[i]) - normalizer) for i in best[:count])
    return Sampled(token, float(logits[token]) - normalizer, top)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise InvalidSampling(name, f"a number from {low} to {high}", value)


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSampling(name, f"an integer from {low} to {high}", value)
