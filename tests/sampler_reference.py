"""llama.cpp's sampler chain as the reference: libllama, which the package xllamacpp carries."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

from eldric.engine.sampling import Logits, SamplingParams


class _Candidate(ctypes.Structure):
    """llama_token_data"""

    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class _Candidates(ctypes.Structure):
    """llama_token_data_array"""

    _fields_ = (
        ("data", ctypes.POINTER(_Candidate)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class _Bias(ctypes.Structure):
    """llama_logit_bias"""

    _fields_ = (("token", ctypes.c_int32), ("bias", ctypes.c_float))


def reference_distribution(logits: Logits, params: SamplingParams, history: Sequence[int]) -> dict[int, float]:
    """What llama.cpp's default chain leaves to draw from: token id to probability."""
    lib, size = _library(), len(logits)
    array = (_Candidate * size)(*(_Candidate(token, value, 0) for token, value in enumerate(logits.tolist())))
    candidates = _Candidates(array, size, -1, False)
    bias = (_Bias * len(params.logit_bias))(*(_Bias(*entry) for entry in params.logit_bias.items()))
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    for sampler in (
        lib.llama_sampler_init_logit_bias(size, len(bias), bias),
        lib.llama_sampler_init_penalties(size, params.penalty_last_n, *penalties),
        lib.llama_sampler_init_top_k(params.top_k),
        lib.llama_sampler_init_top_p(params.top_p, 1),
        lib.llama_sampler_init_min_p(params.min_p, 1),
        lib.llama_sampler_init_temp(params.temperature),
    ):
        for token in history:
            lib.llama_sampler_accept(sampler, token)
        lib.llama_sampler_apply(sampler, ctypes.byref(candidates))
        lib.llama_sampler_free(sampler)
    left = [candidates.data[index] for index in range(candidates.size)]
    weights = np.exp(np.array([candidate.logit for candidate in left]) - max(candidate.logit for candidate in left))
    return {candidate.id: float(weight / weights.sum()) for candidate, weight in zip(left, weights, strict=True)}


@functools.cache
def _library() -> Any:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp.abi3.*")
    lib = ctypes.CDLL(str(path))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    for name, result, *arguments in (
        ("llama_sampler_init_logit_bias", pointer, number, number, ctypes.POINTER(_Bias)),
        ("llama_sampler_init_penalties", pointer, number, number, real, real, real),
        ("llama_sampler_init_top_k", pointer, number),
        ("llama_sampler_init_top_p", pointer, real, ctypes.c_size_t),
        ("llama_sampler_init_min_p", pointer, real, ctypes.c_size_t),
        ("llama_sampler_init_temp", pointer, real),
        ("llama_sampler_accept", None, pointer, number),
        ("llama_sampler_apply", None, pointer, ctypes.POINTER(_Candidates)),
        ("llama_sampler_free", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
