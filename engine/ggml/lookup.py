"""Token embeddings for devices that cannot read rows of a quantized tensor: looked up in the mapped file by the CPU."""

import ctypes

from eldric.engine.errors import UnsupportedModel
from eldric.engine.ggml.library import Library
from eldric.engine.step import Hidden
from eldric.engine.tensor_types import TensorType
from eldric.engine.tensors import TensorInfo

_FLOATS = {TensorType.F16: "ggml_fp16_to_fp32_row", TensorType.BF16: "ggml_bf16_to_fp32_row"}


class TokenTable:
    """A matrix [hidden_size, vocab_size] in mapped memory, which must stay mapped."""

    def __init__(self, library: Library, info: TensorInfo, address: int) -> None:
        self.info = info
        self._width, self._row_bytes, self._address = info.shape[0], info.type.row_bytes(info.shape[0]), address
        self._is_f32 = info.type is TensorType.F32
        if not self._is_f32:
            kind = library.api.ggml_type_name(int(info.type)).decode()
            name = _FLOATS.get(info.type, f"dequantize_row_{kind}")
            function = library.function(name, None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
            if function is None:
                raise UnsupportedModel(f"ggml {library.version} cannot read rows of type {info.type.name}")
            self._to_f32 = function

    def look_up(self, ids: list[int], rows: Hidden) -> None:
        """Write the embedding of each id into its row. rows: [ids, hidden_size], contiguous."""
        target, target_bytes = rows.ctypes.data, 4 * self._width
        for index, token in enumerate(ids):
            source = self._address + token * self._row_bytes
            if self._is_f32:
                ctypes.memmove(target + index * target_bytes, source, target_bytes)
            else:
                self._to_f32(source, target + index * target_bytes, self._width)
