"""The engine's own attention: what it computes, and that a query's bits depend on its own sequence alone."""

import ctypes
from collections.abc import Sequence
from threading import Thread
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels.attending import Attention
from eldric.engine.kernels.compiler import attention_kernel
from eldric.engine.kernels.isa import ISAS, Isa, host_features, isa_of
from eldric.engine.tensor_types import TensorType

Floats = NDArray[np.float32]

_CUSTOM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_TYPES = {TensorType.F16: np.float16, TensorType.F32: np.float32}

pytestmark = pytest.mark.skipif(isa_of(host_features()) is None, reason="no kernels for this processor")


class Heads(NamedTuple):
    heads: int
    key_heads: int
    dim: int
    kind: TensorType = TensorType.F16


#: As of Llama 1B, SmolLM2 135M, Llama 8B; many heads of one key head, and none that share one; an odd size.
SHAPES = [Heads(32, 4, 64), Heads(9, 3, 64), Heads(32, 8, 128), Heads(71, 1, 64), Heads(4, 4, 32), Heads(6, 2, 48)]
SHAPES += [Heads(8, 2, 64, TensorType.F32)]
CELLS = 330


class Cache:
    """Keys and values of one slot: [key heads, cells, dim], with stale values where nothing was written."""

    def __init__(self, heads: Heads, written: int = CELLS) -> None:
        draw, shape = np.random.default_rng(heads.dim), (heads.key_heads, CELLS + 20, heads.dim)
        self.heads = heads
        self.keys = draw.standard_normal(shape, np.float32).astype(_TYPES[heads.kind])
        self.values = draw.standard_normal(shape, np.float32).astype(_TYPES[heads.kind])
        self.keys[:, written:] = self.values[:, written:] = np.nan


def queries_of(heads: Heads, positions: Sequence[int]) -> Floats:
    """[rows, heads, dim]: the same ones for the same positions."""
    draws = [np.random.default_rng(position) for position in positions]
    return np.stack([draw.standard_normal((heads.heads, heads.dim), np.float32) * 2 for draw in draws])


def tensor(array: NDArray[np.generic], *order: int) -> Tensor:
    """A view whose dimension i is the array's dimension order[i]."""
    made = Tensor()
    made.data = array.ctypes.data
    for index in range(4):
        made.ne[index] = array.shape[order[index]] if index < len(order) else 1
        made.nb[index] = array.strides[order[index]] if index < len(order) else 0
    return made


def attend(
    cache: Cache, positions: Sequence[int], threads: int = 1, isa: Isa | None = None, cells: int | None = None
) -> Floats:
    """[rows, heads, dim] for queries at these positions. cells: in use, if not all up to the last position."""
    heads = cache.heads
    function = attention_kernel(heads.dim, heads.kind, isa)
    assert function is not None
    attention = Attention(function, heads.dim, threads)
    queries, places = queries_of(heads, positions), np.array(positions, np.int32)
    cells = cells or max(positions) + 1
    sources = [tensor(queries, 2, 0, 1)]
    sources += [tensor(each[:, :cells], 2, 1, 0) for each in (cache.keys, cache.values)] + [tensor(places, 0)]
    result = np.full_like(queries, np.nan)
    target = tensor(result, 2, 1, 0)
    for index, source in enumerate(sources):
        target.src[index] = ctypes.addressof(source)
    at_work = [
        Thread(target=_CUSTOM(function), args=(ctypes.addressof(target), thread, threads, attention.task))
        for thread in range(threads)
    ]
    for each in at_work:
        each.start()
    for each in at_work:
        each.join()
    attention.close()
    return result


def expected(cache: Cache, positions: Sequence[int]) -> NDArray[np.float64]:
    heads, queries = cache.heads, queries_of(cache.heads, positions).astype(np.float64)
    result = np.empty_like(queries)
    for row, position in enumerate(positions):
        for head in range(heads.heads):
            group = head // (heads.heads // heads.key_heads)
            keys, values = (each[group, : position + 1].astype(np.float64) for each in (cache.keys, cache.values))
            scores = keys @ queries[row, head] / np.sqrt(heads.dim)
            weights = np.exp(scores - scores.max())
            result[row, head] = weights @ values / weights.sum()
    return result


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("positions", [(0,), (63,), (64,), (329,), tuple(range(100, 137)), (0, 1, 2)], ids=len)
def test_attention_is_that_of_the_formula(heads: Heads, positions: tuple[int, ...]) -> None:
    cache = Cache(heads, written=max(positions) + 1)
    np.testing.assert_allclose(attend(cache, positions), expected(cache, positions), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_a_query_gets_the_same_bits_alone_in_any_chunk_and_on_any_thread(heads: Heads) -> None:
    cache = Cache(heads)
    alone = np.concatenate([attend(cache, [position]) for position in range(40, 150)])
    for length in (2, 7, 64, 110):
        for start in range(0, 110, length):
            rows = range(start, min(start + length, 110))
            found = attend(cache, [40 + row for row in rows])
            np.testing.assert_array_equal(found, alone[rows.start : rows.stop], err_msg=f"{rows}")
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(attend(cache, range(40, 150), threads), alone)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_every_vector_extension_gives_the_same_bits(heads: Heads) -> None:
    features, cache = host_features(), Cache(heads)
    needs = {"avx512-vnni": "avx512vnni", "avx-vnni": "avxvnni", "avx2": "avx2"}
    runnable = [isa for name, isa in ISAS.items() if features.get(needs[name])]
    found = [attend(cache, range(250, 290), isa=isa) for isa in runnable]
    assert found and all((each == found[0]).all() for each in found)


def test_rows_that_pad_a_chunk_see_no_more_than_there_is() -> None:
    cache = Cache(SHAPES[0], written=99)
    found = attend(cache, [97, 98, 99, 100], cells=99)
    np.testing.assert_array_equal(attend(cache, [97, 98]), found[:2])
    assert np.isfinite(found).all()


def test_what_is_not_a_number_stays_with_the_queries_that_see_it() -> None:
    cache = Cache(SHAPES[1])
    cache.keys[1, 50] = np.nan
    found = attend(cache, [40, 49, 50, 60])
    assert np.isfinite(found[:2]).all()
    assert np.isnan(found[2:, 3:6]).all() and np.isfinite(found[2:, :3]).all() and np.isfinite(found[2:, 6:]).all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    cache = Cache(Heads(2, 1, 64, TensorType.F32))
    cache.keys *= 1e4
    found = attend(cache, [329])
    np.testing.assert_allclose(found, expected(cache, [329]), rtol=1e-4, atol=1e-5)


def test_shapes_that_no_kernel_is_written_for_are_left_to_the_device() -> None:
    assert attention_kernel(64, TensorType.F16)
    assert attention_kernel(72, TensorType.F16) is None and attention_kernel(512, TensorType.F16) is None
    assert attention_kernel(64, TensorType.Q8_0) is None
