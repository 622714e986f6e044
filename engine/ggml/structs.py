"""The few ggml structs that are read or written directly, and the proof that the loaded library lays them out so.

Layouts: ggml.h and ggml-backend.h of ggml 0.25 and 0.26. Everything else is reached through functions, by pointer.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

from eldric.engine.errors import LibraryError
from eldric.engine.tensor_types import TensorType

MAX_DIMS = 4
MAX_SRC = 10
MAX_THREADS = 512
DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Tensor(ctypes.Structure):
    """struct ggml_tensor"""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),  # values in each dimension
        ("nb", ctypes.c_size_t * MAX_DIMS),  # bytes from one to the next in each dimension
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class DeviceProps(ctypes.Structure):
    """struct ggml_backend_dev_props, with its struct ggml_backend_dev_caps"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("can_async", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
        ("unknown", ctypes.c_char * 64),  # room for what later versions append
    )


class ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params"""

    _fields_ = (
        ("cpumask", ctypes.c_bool * MAX_THREADS),  # all false: no pinning
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),  # 0: sleep at once, 100: spin
        ("strict_cpu", ctypes.c_bool),  # each thread on a CPU of its own
        ("paused", ctypes.c_bool),
        ("unknown", ctypes.c_char * 64),
    )


def check_layout(api: Any, where: str) -> None:
    """Make known tensors and compare every field that is used with what the library's own functions say.

    Raises LibraryError that names all differences.
    """
    problems = [*_type_problems(api), *_tensor_problems(api), *_threadpool_problems(api)]
    if problems:
        raise LibraryError(f"{where} lays out its structs differently: {'; '.join(problems)}")


def check_device(api: Any, device: int, where: str) -> None:
    """Raises LibraryError if struct ggml_backend_dev_props of a device does not match the device's accessors."""
    props = DeviceProps()
    api.ggml_backend_dev_get_props(device, ctypes.byref(props))
    if props.name != api.ggml_backend_dev_name(device) or props.type != api.ggml_backend_dev_type(device):
        raise LibraryError(f"{where} lays out ggml_backend_dev_props differently")


def _type_problems(api: Any) -> Iterator[str]:
    for kind in TensorType:
        name = (api.ggml_type_name(int(kind)) or b"none").decode().upper()
        if name == "NONE":
            continue  # an older ggml, without this type
        if name != kind.name:
            yield f"type {int(kind)} is {name} and not {kind.name}"
        elif (api.ggml_blck_size(int(kind)), api.ggml_type_size(int(kind))) != (kind.block_size, kind.type_bytes):
            yield f"blocks of {kind.name} have another size"


def _tensor_problems(api: Any) -> Iterator[str]:
    memory = (ctypes.c_char * 65536)()
    address = ctypes.addressof(memory)
    ctx = api.ggml_init(InitParams(len(memory), address, False))
    if (
        not ctx
        or api.ggml_get_mem_size(ctx) != len(memory)
        or api.ggml_get_mem_buffer(ctx) != address
        or api.ggml_get_no_alloc(ctx)
    ):
        yield "ggml_init_params"
        return
    try:
        whole = api.ggml_new_tensor_4d(ctx, int(TensorType.F32), 3, 5, 7, 2)
        view = api.ggml_view_2d(ctx, whole, 3, 5, 12, 60)
        total = api.ggml_add(ctx, whole, whole)
        if api.ggml_tensor_overhead() < ctypes.sizeof(Tensor):
            yield f"a tensor takes {api.ggml_tensor_overhead()} bytes, less than {ctypes.sizeof(Tensor)}"
            return
        tensor, part, result = (Tensor.from_address(pointer) for pointer in (whole, view, total))
        found = {
            "type": tensor.type == int(TensorType.F32),
            "ne": tuple(tensor.ne) == (3, 5, 7, 2),
            "nb": tuple(tensor.nb) == (4, 12, 60, 420),
            "data": tensor.data == api.ggml_get_data(whole),
            "name": whole + Tensor.name.offset == api.ggml_get_name(whole),
            "view_src": (tensor.view_src, part.view_src) == (None, whole),
            "view_offs": part.view_offs == 60,
            "view data": part.data == (tensor.data or 0) + 60,
            "src": tuple(result.src[:3]) == (whole, whole, None),
            "buffer": tensor.buffer is None,
            "extra": tensor.extra is None,
        }
        wrong = [field for field, same in found.items() if not same]
        if wrong:
            yield f"ggml_tensor's {', '.join(wrong)}"
    finally:
        api.ggml_free(ctx)


def _threadpool_problems(api: Any) -> Iterator[str]:
    params = ThreadpoolParams()
    api.ggml_threadpool_params_init(ctypes.byref(params), 3)
    expected = (3, 0, 50, False, False, False)  # 3 threads of normal priority that poll half of the time
    seen = (params.n_threads, params.prio, params.poll, params.strict_cpu, params.paused, any(params.cpumask))
    if seen != expected:
        yield f"ggml_threadpool_params reads {seen} and not {expected}"
