"""The engine's own matrix kernels: what they compute, and that it depends on nothing else."""

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from llvmlite import binding
from numpy.typing import NDArray

from eldric.engine.ggml.structs import Tensor
from eldric.engine.kernels import compiler
from eldric.engine.kernels.compiler import attention_kernel, kernels_for, largest_kernel
from eldric.engine.kernels.formats import FORMATS
from eldric.engine.kernels.isa import AVX2, AVX512_VNNI, AVX_VNNI, Isa, host_features, isa_of
from eldric.engine.kernels.largest import NOT_A_NUMBER
from eldric.engine.kernels.panels import Panels, panel_bytes
from eldric.engine.kernels.product import PASS_ROWS
from eldric.engine.tensor_types import TensorType
from eldric.engine.tensors import TensorInfo

Floats = NDArray[np.float32]

COLUMNS, ROWS = 512, 48
KINDS = sorted(FORMATS)
_HALVES = {
    TensorType.Q4_1: (0, 2),
    TensorType.Q5_1: (0, 2),
    TensorType.Q2_K: (80, 82),
    TensorType.Q3_K: (108,),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,),
}  # where the scales are
_CUSTOM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)

pytestmark = pytest.mark.skipif(isa_of(host_features()) is None, reason="no kernels for this processor")


def runnable() -> Iterator[Isa]:
    features = host_features()
    if features.get("avx2"):
        yield AVX2
    if features.get("avxvnni"):
        yield AVX_VNNI
    if features.get("avx512vnni"):
        yield AVX512_VNNI


def info(kind: TensorType, rows: int) -> TensorInfo:
    return TensorInfo("m", kind, (COLUMNS, rows), 0, 0, rows * kind.row_bytes(COLUMNS))


@dataclass
class Matrix:
    """Random blocks of a type, with scales of the size that weights have; or random numbers."""

    kind: TensorType

    def __post_init__(self) -> None:
        draw = np.random.default_rng(int(self.kind))
        self.info = info(self.kind, ROWS)
        if self.kind is TensorType.F16:
            halves = draw.uniform(-0.1, 0.1, (ROWS, COLUMNS)).astype(np.float16)
            self.raw, self.values = halves.view(np.uint8), halves.astype(np.float64)
            return
        blocks = COLUMNS // self.kind.block_size
        raw = draw.integers(0, 256, (ROWS, blocks, self.kind.type_bytes), dtype=np.uint8)
        for offset in _HALVES.get(self.kind, (0,)):
            scales = draw.uniform(-0.01, 0.01, (ROWS, blocks, 1)).astype(np.float16)
            raw[:, :, offset : offset + 2] = scales.view(np.uint8)
        self.raw = raw.reshape(ROWS, -1)
        self.values = quants.dequantize(self.raw, GGMLQuantizationType[self.kind.name]).astype(np.float64)


def multiply(matrix: Matrix, vectors: Floats, threads: int = 1, rows: int = PASS_ROWS) -> Floats:
    """vectors: [rows, columns]. Returns [rows, rows of the matrix], computed by so many threads at once."""
    panels = Panels([matrix.info])
    panels.take_scratch(rows, threads)
    panel = panels["m"]
    panel.pack(matrix.raw.ctypes.data)
    result = np.full((len(vectors), ROWS), np.nan, np.float32)
    source, target = Tensor(), Tensor()
    for tensor, array in ((source, vectors), (target, result)):
        tensor.data, tensor.ne[0], tensor.ne[1] = array.ctypes.data, array.shape[1], array.shape[0]
        tensor.nb[0], tensor.nb[1] = 4, array.strides[0]
    target.src[0] = ctypes.addressof(source)
    at_work = [
        Thread(target=_CUSTOM(panel.product), args=(ctypes.addressof(target), thread, threads, panel.task))
        for thread in range(1, threads)
    ]
    for each in at_work:
        each.start()
    _CUSTOM(panel.product)(ctypes.addressof(target), 0, threads, panel.task)
    for each in at_work:
        each.join()
    panels.close()
    return result


def activations(rows: int) -> Floats:
    return np.random.default_rng(rows).standard_normal((rows, COLUMNS), np.float32)


def in_bytes(vectors: Floats, block: int) -> NDArray[np.float64]:
    """The values that ggml's quantize_row_q8_0 (blocks of 32) or quantize_row_q8_K leaves of activations."""
    blocks = vectors.reshape(len(vectors), -1, block)
    most = np.abs(blocks).max(-1, keepdims=True)
    scale = most / np.float32(127)
    if block == 32:
        scale = scale.astype(np.float16).astype(np.float32)
    whole: NDArray[np.float64] = np.rint(blocks * (np.float32(127) / most)).astype(np.float64)
    values: NDArray[np.float64] = whole * scale
    return values.reshape(vectors.shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_are_those_of_the_dequantized_matrix(kind: TensorType) -> None:
    matrix, vectors = Matrix(kind), activations(5)
    seen = vectors.astype(np.float64) if kind is TensorType.F16 else in_bytes(vectors, kind.block_size)
    expected = seen @ matrix.values.T
    np.testing.assert_allclose(multiply(matrix, vectors), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_gets_the_same_bits_beside_any_number_of_rows_and_on_any_thread(kind: TensorType) -> None:
    matrix, vectors = Matrix(kind), activations(2 * PASS_ROWS + 3)
    alone = np.concatenate([multiply(matrix, row[None]) for row in vectors])
    for rows in (*range(2, 19), 31, PASS_ROWS, PASS_ROWS + 1, len(vectors)):
        np.testing.assert_array_equal(multiply(matrix, vectors[:rows]), alone[:rows], err_msg=f"{rows} rows")
    for threads, rows in itertools.product((2, 3, 5), (3, 9, len(vectors))):
        result = multiply(matrix, vectors[:rows], threads)
        np.testing.assert_array_equal(result, alone[:rows], err_msg=f"{rows} rows, {threads} threads")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_vector_extension_gives_the_same_bits(kind: TensorType, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, vectors, found = Matrix(kind), activations(21), {}
    for isa in runnable():
        monkeypatch.setattr("eldric.engine.kernels.panels.kernels_for", lambda kind, isa=isa: kernels_for(kind, isa))
        found[isa.name] = multiply(matrix, vectors)
    assert len(found) >= 1
    for name, result in found.items():
        np.testing.assert_array_equal(result, found["avx2"], err_msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_zeros_and_of_extremes_are_exact(kind: TensorType) -> None:
    matrix = Matrix(kind)
    vectors = np.zeros((4, COLUMNS), np.float32)
    vectors[1], vectors[2, ::2] = 127.0, -127.0
    vectors[3, 7] = 127.0
    expected = vectors.astype(np.float64) @ matrix.values.T
    result = multiply(matrix, vectors)
    assert not result[0].any()
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_not_a_number_stays_so_in_its_row_alone(kind: TensorType) -> None:
    matrix, vectors = Matrix(kind), activations(3)
    expected = multiply(matrix, vectors)
    vectors[1, 300] = np.nan
    result = multiply(matrix, vectors)
    assert np.isnan(result[1]).all()
    np.testing.assert_array_equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("width", [16, 17, 100, 4099])
def test_largest_value_is_that_of_numpy(width: int) -> None:
    draw = np.random.default_rng(width)
    rows = np.concatenate([draw.standard_normal((40, width)), draw.integers(0, 3, (40, width))]).astype(np.float32)
    rows[0] = -3.5
    for isa in runnable():
        for threads in (1, 3):
            assert largest(rows, isa, threads) == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_rows_that_are_no_numbers_have_no_largest_value(strange: float) -> None:
    rows = activations(4)
    rows[1, 3], rows[2, -1] = strange, strange
    rows[3] = -np.inf
    for isa in runnable():
        first, *others = largest(rows, isa, 1)
        assert (first, others) == (rows[0].argmax(), [NOT_A_NUMBER] * 3)


def largest(rows: Floats, isa: Isa, threads: int) -> list[int]:
    found = largest_kernel(isa)
    assert found is not None and rows.shape[1] >= found[1]
    result = np.full(len(rows), -7, np.int32)
    source, target = Tensor(), Tensor()
    source.data, source.ne[0], source.ne[1], source.nb[1] = rows.ctypes.data, *rows.shape[::-1], rows.strides[0]
    target.data, target.src[0] = result.ctypes.data, ctypes.addressof(source)
    for thread in range(threads):
        _CUSTOM(found[0])(ctypes.addressof(target), thread, threads, None)
    return result.tolist()


def test_strides_of_a_view_are_heeded() -> None:
    matrix, wide = Matrix(TensorType.Q4_0), activations(6)
    np.testing.assert_array_equal(multiply(matrix, wide[::2]), multiply(matrix, wide[::2].copy()))


def test_matrices_that_fill_no_panel_or_have_no_kernels_are_left_alone() -> None:
    assert panel_bytes(Matrix(TensorType.Q4_0).info)
    assert panel_bytes(info(TensorType.Q4_0, ROWS + 1)) is None
    assert panel_bytes(info(TensorType.BF16, ROWS)) is None


def test_extension_follows_from_the_features() -> None:
    older = {"avx2": True, "fma": True, "f16c": True}
    assert isa_of({**older, "avx512vnni": True, "avx512bw": True}) is AVX512_VNNI
    assert isa_of({**older, "avxvnni": True}) is AVX_VNNI
    assert isa_of(older) is AVX2
    assert isa_of({"avx2": True}) is None and isa_of({}) is None


class Forgetful(dict[object, object]):
    """Finds nothing that was put in."""

    def get(self, key: object, default: object = None) -> object:
        return default


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled kernels, and a process that has compiled none."""
    monkeypatch.setattr(compiler, "_folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr(compiler, "_engines", Forgetful())
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each module that is compiled."""
    seen: list[str] = []
    compile_apart = compiler._compile_apart

    def watched(module: str, isa: Isa) -> bytes:
        seen.append(module)
        return compile_apart(module, isa)

    monkeypatch.setattr(compiler, "_compile_apart", watched)
    return seen


def test_kernels_are_compiled_once_and_kept(folder: Path, compiled: list[str]) -> None:
    assert kernels_for(TensorType.Q4_0) and kernels_for(TensorType.Q4_0)
    assert len(compiled) == 1
    assert [path.name[:5] for path in folder.iterdir()] == ["q4_0-"]


def test_damaged_kernels_are_compiled_again(folder: Path, compiled: list[str]) -> None:
    kernels_for(TensorType.Q4_0)
    (kept,) = folder.iterdir()
    content = kept.read_bytes()
    for broken in (content[:-1], content[:100] + b"\0" + content[101:], b""):
        kept.write_bytes(broken)
        assert kernels_for(TensorType.Q4_0)
        assert kept.read_bytes() == content
    assert len(compiled) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_kernels_that_others_could_have_written_are_not_run(folder: Path, compiled: list[str]) -> None:
    kernels_for(TensorType.Q4_0)
    folder.chmod(0o777)
    kernels_for(TensorType.Q4_0)
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, compiled: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiler, "_folder", lambda: tmp_path / "file" / "kernels")
    assert kernels_for(TensorType.Q4_0) and kernels_for(TensorType.Q4_0)
    assert len(compiled) == 2


def test_kernels_are_compiled_here_where_no_other_process_can_do_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "no such python"))
    assert kernels_for(TensorType.Q4_0)
    assert "kernels_not_compiled_apart=Q4_0 reason=" in caplog.text


@pytest.mark.parametrize(("cpu", "isa"), [("haswell", AVX2), ("alderlake", AVX_VNNI), ("icelake-server", AVX512_VNNI)])
def test_code_for_another_processor_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cpu: str, isa: Isa
) -> None:
    """What a compiler makes of wide vectors depends on what the processor has besides."""
    if isa not in runnable():
        pytest.skip(f"this processor does not have {isa.name}")
    matrices, vectors = [Matrix(TensorType.Q4_0), Matrix(TensorType.Q6_K)], activations(9)
    expected = [multiply(matrix, vectors) for matrix in matrices]
    likeliest = largest(expected[0], isa, 1)
    target = binding.Target.from_default_triple()
    monkeypatch.setattr(compiler, "_machine", lambda: target.create_target_machine(cpu=cpu, opt=3))
    monkeypatch.setattr(compiler, "_compile_apart", compiler.compile_module)
    monkeypatch.setattr("eldric.engine.kernels.panels.kernels_for", lambda kind: kernels_for(kind, isa))
    for matrix, bits in zip(matrices, expected, strict=True):
        np.testing.assert_array_equal(multiply(matrix, vectors), bits)
    assert largest(expected[0], isa, 1) == likeliest
    assert attention_kernel(64, TensorType.F16, isa)
