"""Which layout is used for how many rows, and how far rows may go together."""

from eldric.engine.ggml.policy import (
    AMX,
    MAPPED,
    REPACK,
    decode_rows,
    exact_rows,
    keeps_mapped,
    packed_pays,
    worth_packing,
)
from eldric.engine.tensor_types import MATRIX_TYPES, TensorType


def test_what_was_not_measured_is_not_packed() -> None:
    assert worth_packing(TensorType.Q4_0, REPACK) and worth_packing(TensorType.Q4_K, AMX)
    assert not worth_packing(TensorType.F16, AMX)
    assert not worth_packing(TensorType.Q4_0, "a layout of a later ggml")


def test_packed_copy_that_does_not_always_pay_has_the_mapped_matrix_beside_it() -> None:
    for packing in (AMX, REPACK):
        for kind in MATRIX_TYPES:
            if worth_packing(kind, packing):
                always = all(packed_pays(kind, packing, rows) for rows in (1, 2, 4, 8, 16, 64, 512))
                assert keeps_mapped(kind, packing) is not always
    assert packed_pays(TensorType.Q4_K, REPACK, 9) and not packed_pays(TensorType.Q4_K, REPACK, 10)
    assert not packed_pays(TensorType.Q6_K, AMX, 3) and packed_pays(TensorType.Q6_K, AMX, 4)


def test_exact_rows_never_promise_what_was_not_tried() -> None:
    for kind in MATRIX_TYPES:
        for layout in (MAPPED, REPACK, AMX, "unknown"):
            least, most = exact_rows(kind, layout)
            assert 1 <= least <= 2 and least <= most <= 64
        assert exact_rows(kind, "unknown") == (1, 1)
    assert exact_rows(TensorType.F16, MAPPED).least == 2
    assert exact_rows(TensorType.Q4_K, MAPPED).most == 7
    assert exact_rows(TensorType.Q4_K, REPACK).most == 3


def test_interleaved_q4_0_is_computed_by_fours() -> None:
    interleaved = [(TensorType.Q4_0, REPACK), (TensorType.Q6_K, MAPPED)]
    assert [decode_rows(interleaved, rows) for rows in range(1, 13)] == [1, 2, 4, 4, 5, 8, 8, 8, 9, 12, 12, 12]
    for others in ([(TensorType.Q4_0, AMX)], [(TensorType.Q4_K, REPACK)], [(TensorType.Q4_0, MAPPED)]):
        assert [decode_rows(others, rows) for rows in (1, 3, 7)] == [1, 3, 7]
