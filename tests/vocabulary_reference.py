"""llama.cpp's tokenizer as the reference: libllama, which the package xllamacpp carries, loads only the vocabulary."""

import ctypes
import functools
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xllamacpp

_ROOM = 1024  # bytes: more than struct llama_model_params has
_VOCAB_ONLY = 72  # byte offset of the flag; the defaults of the flags from there on tell whether it is so
_FLAGS = bytes((0, 0, 1, 0, 0))  # vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc
_MOST_TOKENS = 1 << 16


class _ModelParams(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _ROOM),)


class VocabularyReference:
    """The vocabulary of one GGUF file, which needs no tensors."""

    def __init__(self, path: Path) -> None:
        self._lib = _library()
        params = self._lib.llama_model_default_params()
        if bytes(params.bytes[_VOCAB_ONLY : _VOCAB_ONLY + len(_FLAGS)]) != _FLAGS:
            raise RuntimeError("libllama's model parameters are laid out differently")
        params.bytes[_VOCAB_ONLY] = 1
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"libllama cannot load {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._ids = (ctypes.c_int32 * _MOST_TOKENS)()
        self.size: int = self._lib.llama_vocab_n_tokens(self._vocab)

    def encode(self, text: str, *, special: bool, add_special: bool) -> list[int]:
        data = text.encode()
        found = self._lib.llama_tokenize(self._vocab, data, len(data), self._ids, _MOST_TOKENS, add_special, special)
        if found < 0:
            raise RuntimeError(f"the text has {-found} tokens")
        return list(self._ids[:found])

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        piece = ctypes.create_string_buffer(1024)
        size = self._lib.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, special)
        return piece.raw[:size]

    def eog_ids(self) -> set[int]:
        return {token for token in range(self.size) if self._lib.llama_vocab_is_eog(self._vocab, token)}

    def close(self) -> None:
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_quiet = _LOG_CALLBACK(lambda level, text, data: None)


@functools.cache
def _library() -> Any:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp.abi3.*")
    lib = ctypes.CDLL(str(path))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, result, *arguments in (
        ("llama_log_set", None, _LOG_CALLBACK, pointer),
        ("llama_model_default_params", _ModelParams),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, _ModelParams),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_model_free", None, pointer),
        ("llama_vocab_n_tokens", number, pointer),
        ("llama_vocab_is_eog", flag, pointer, number),
        ("llama_tokenize", number, pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, flag, flag),
        ("llama_token_to_piece", number, pointer, number, ctypes.c_char_p, number, number, flag),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_quiet, None)
    return lib
