"""Finding ggml, binding it, and refusing one that is not what this engine was written for."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eldric.engine.errors import LibraryError
from eldric.engine.ggml import library as library_module
from eldric.engine.ggml.api import Api
from eldric.engine.ggml.library import find_library
from eldric.engine.ggml.structs import Tensor, ThreadpoolParams, check_device, check_layout


class Altered:
    """The library's functions, with some replaced."""

    def __init__(self, api: Any, **replaced: Any) -> None:
        self._api, self._replaced = api, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._api, name)


def test_found_library_lists_the_cpu_first() -> None:
    devices = find_library().devices()
    assert devices[0].kind == "cpu"
    assert devices[0].host_pointers
    assert devices[0].memory_bytes > 1 << 28


def test_a_library_is_loaded_once() -> None:
    assert find_library() is find_library()


def test_device_is_found_in_any_case_and_an_unknown_one_names_the_known() -> None:
    library = find_library()
    assert library.device("CPU") == library.device("cpu")
    with pytest.raises(LibraryError, match=r"no device 'abacus', only .*CPU"):
        library.device("abacus")


def test_named_folder_is_taken_or_refused_and_nothing_else_is_tried(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="holds no"):
        find_library({"ELDRIC_GGML_DIR": str(tmp_path)})
    folder = find_library().folder
    assert find_library({"ELDRIC_GGML_DIR": str(folder)}).folder == folder


def test_broken_library_is_refused_with_its_folder(tmp_path: Path) -> None:
    for path in find_library().folder.glob("*ggml*"):
        (tmp_path / path.name).write_bytes(b"no library")
    with pytest.raises(LibraryError, match=f"cannot load ggml from {tmp_path}"):
        find_library({"ELDRIC_GGML_DIR": str(tmp_path)})


def test_llama_cpp_python_comes_first_and_an_unusable_one_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = find_library({})
    folder = tmp_path / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for path in usual.folder.glob("*ggml-base*"):
        (folder / path.name).write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_library({}) is usual
    assert str(folder) in caplog.text


def test_llama_cpp_python_is_preferred_when_it_is_usable(tmp_path: Path) -> None:
    folder = tmp_path / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    for path in find_library().folder.glob("*ggml*"):
        (folder / path.name).symlink_to(path)
    code = "from eldric.engine.ggml.library import find_library; print(find_library({}).folder)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(folder)


def loaded_with(variant: str) -> subprocess.CompletedProcess[str]:
    """Loads ggml in a process of its own: a process has one variant for life."""
    code = "from eldric.engine.ggml.library import find_library; print(find_library().cpu_variant)"
    environment = {**os.environ, "ELDRIC_GGML_VARIANT": variant}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_named_cpu_variant_is_taken_though_another_scores_better() -> None:
    best = find_library().cpu_variant
    if not best:
        pytest.skip("this platform's ggml has one CPU backend")
    plain = "x64" if platform.machine() == "x86_64" else best
    assert loaded_with(plain).stdout.strip() == plain
    assert loaded_with("").stdout.strip() == best


def test_a_cpu_variant_that_is_not_there_is_refused_with_those_that_are() -> None:
    refused = loaded_with("abacus")
    assert refused.returncode == 1
    assert f"ELDRIC_GGML_VARIANT is 'abacus'; of {find_library().folder} run here: " in refused.stderr
    assert find_library().cpu_variant in refused.stderr


def test_no_library_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LibraryError, match="Install transcribe-cpp-native"):
        find_library({})


def test_missing_functions_are_named() -> None:
    with pytest.raises(LibraryError, match=r"a C library has no ggml_version, .*ggml_flash_attn_ext"):
        Api((ctypes.CDLL(None),), "a C library")


@pytest.mark.parametrize("version", ["0.24.9", "1.0.0", "0.100.0", "unknown", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(LibraryError, match=r"not among the versions .* 0\.25"):
        library_module._check_version(version, "here")


def test_layout_of_the_loaded_library_is_the_expected_one() -> None:
    library = find_library()
    check_layout(library.api, "here")
    for device in library.devices():
        check_device(library.api, device.handle, "here")


def test_shifted_tensor_struct_is_refused_with_the_fields() -> None:
    api = find_library().api
    moved = Altered(api, ggml_get_name=lambda tensor: api.ggml_get_name(tensor) + 8)
    with pytest.raises(LibraryError, match=r"here lays out its structs differently: ggml_tensor's name"):
        check_layout(moved, "here")

    def swapped(ctx: int, kind: int, a: int, b: int, c: int, d: int) -> int:
        tensor: int = api.ggml_new_tensor_4d(ctx, kind, a, b, c, d)
        Tensor.from_address(tensor).ne[0], Tensor.from_address(tensor).nb[1] = 4, 16
        return tensor

    with pytest.raises(LibraryError, match="ne, nb"):
        check_layout(Altered(api, ggml_new_tensor_4d=swapped), "here")


def test_smaller_tensor_struct_is_refused() -> None:
    smaller = Altered(find_library().api, ggml_tensor_overhead=lambda: ctypes.sizeof(Tensor) - 8)
    with pytest.raises(LibraryError, match="a tensor takes"):
        check_layout(smaller, "here")


def test_other_block_sizes_and_type_numbers_are_refused() -> None:
    api = find_library().api
    larger = Altered(api, ggml_type_size=lambda kind: api.ggml_type_size(kind) + (kind == 8))
    with pytest.raises(LibraryError, match="blocks of Q8_0 have another size"):
        check_layout(larger, "here")
    renamed = Altered(api, ggml_type_name=lambda kind: b"q9_9" if kind == 12 else api.ggml_type_name(kind))
    with pytest.raises(LibraryError, match="type 12 is Q9_9 and not Q4_K"):
        check_layout(renamed, "here")


def test_types_that_an_older_library_lacks_are_no_difference() -> None:
    api = find_library().api
    check_layout(Altered(api, ggml_type_name=lambda kind: b"NONE" if kind > 39 else api.ggml_type_name(kind)), "here")


def test_other_threadpool_and_device_structs_are_refused() -> None:
    api = find_library().api

    def shifted(params: Any, threads: int) -> None:
        ctypes.memset(params, 1, ctypes.sizeof(ThreadpoolParams))

    with pytest.raises(LibraryError, match="ggml_threadpool_params"):
        check_layout(Altered(api, ggml_threadpool_params_init=shifted), "here")
    device = find_library().devices()[0].handle
    with pytest.raises(LibraryError, match="ggml_backend_dev_props"):
        check_device(Altered(api, ggml_backend_dev_type=lambda handle: 3), device, "here")
