"""ggml's C functions as Python callables: names, result and argument types, as declared in ggml.h, ggml-alloc.h and
ggml-backend.h. Opaque objects (contexts, tensors, graphs, buffers, devices) are addresses: int, or None for NULL."""

import ctypes
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from eldric.engine.errors import LibraryError
from eldric.engine.ggml.structs import InitParams

_P, _S, _I, _N, _L, _F = c_void_p, c_char_p, c_int, c_size_t, c_int64, c_float

# name: (result, argument types)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (_S, ()),
    "ggml_log_set": (None, (_P, _P)),
    # contexts and tensors
    "ggml_init": (_P, (InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_get_mem_size": (_N, (_P,)),
    "ggml_get_mem_buffer": (_P, (_P,)),
    "ggml_get_no_alloc": (c_bool, (_P,)),
    "ggml_tensor_overhead": (_N, ()),
    "ggml_type_name": (_S, (_I,)),
    "ggml_type_size": (_N, (_I,)),
    "ggml_blck_size": (_L, (_I,)),
    "ggml_get_data": (_P, (_P,)),
    "ggml_get_name": (_P, (_P,)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _L)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_new_tensor_4d": (_P, (_P, _I, _L, _L, _L, _L)),
    "ggml_new_tensor": (_P, (_P, _I, _I, _P)),
    # operations
    "ggml_view_1d": (_P, (_P, _P, _L, _N)),
    "ggml_view_2d": (_P, (_P, _P, _L, _L, _N, _N)),
    "ggml_view_3d": (_P, (_P, _P, _L, _L, _L, _N, _N, _N)),
    "ggml_reshape_3d": (_P, (_P, _P, _L, _L, _L)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_set_rows": (_P, (_P, _P, _P, _P)),
    "ggml_rms_norm": (_P, (_P, _P, _F)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_custom_4d": (_P, (_P, _I, _L, _L, _L, _L, _P, _I, _P, _I, _P)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_rope_ext": (_P, (_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "ggml_flash_attn_ext_set_prec": (None, (_P, _I)),
    # graphs
    "ggml_graph_overhead_custom": (_N, (_N, c_bool)),
    "ggml_new_graph_custom": (_P, (_P, _N, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_graph_n_nodes": (_I, (_P,)),
    "ggml_graph_node": (_P, (_P, _I)),
    "ggml_op_desc": (_S, (_P,)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    "ggml_gallocr_get_buffer_size": (_N, (_P, _I)),
    # buffers
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buft_name": (_S, (_P,)),
    "ggml_backend_buft_alloc_buffer": (_P, (_P, _N)),
    "ggml_backend_buft_get_alignment": (_N, (_P,)),
    "ggml_backend_buft_get_alloc_size": (_N, (_P, _P)),
    "ggml_backend_buft_is_host": (c_bool, (_P,)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buffer_get_size": (_N, (_P,)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_clear": (None, (_P, ctypes.c_uint8)),
    "ggml_backend_buffer_set_usage": (None, (_P, _I)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, _N, _N)),
    "ggml_backend_tensor_get": (None, (_P, _P, _N, _N)),
    # devices and backends
    "ggml_backend_load": (_P, (_S,)),
    "ggml_backend_dev_count": (_N, ()),
    "ggml_backend_dev_get": (_P, (_N,)),
    "ggml_backend_dev_name": (_S, (_P,)),
    "ggml_backend_dev_type": (_I, (_P,)),
    "ggml_backend_dev_get_props": (None, (_P, _P)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_dev_init": (_P, (_P, _S)),
    "ggml_backend_dev_buffer_type": (_P, (_P,)),
    "ggml_backend_dev_buffer_from_host_ptr": (_P, (_P, _P, _N, _N)),
    "ggml_backend_dev_supports_op": (c_bool, (_P, _P)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, _S)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_threadpool_params_init": (None, (_P, _I)),
}


class Api:
    """Every function of the table as an attribute of its C name. Calls release the interpreter's lock."""

    def __init__(self, libraries: tuple[ctypes.CDLL, ...], where: str) -> None:
        """libraries: where to look, in order. Raises LibraryError that names the functions that are missing."""
        missing = []
        for name, (result, arguments) in _FUNCTIONS.items():
            for library in libraries:
                function = getattr(library, name, None)
                if function is not None:
                    function.restype, function.argtypes = result, arguments
                    setattr(self, name, function)
                    break
            else:
                missing.append(name)
        if missing:
            raise LibraryError(f"{where} has no {', '.join(missing)}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not in the table of bound functions")
