"""llama.cpp as the reference: logits of libllama, which the package xllamacpp carries, for the tokens of a prompt.

Its bindings give no logits, so the C API is called. The parameter structs are taken from libllama's own defaults, as
opaque memory, and only their first fields are changed; accessors tell whether those were the fields that were meant.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xllamacpp
from numpy.typing import NDArray

_ROOM = 1024  # bytes: more than either struct has


class _Params(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * (_ROOM // 4)),)


class _Batch(ctypes.Structure):
    """struct llama_batch"""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class LlamaReference:
    """One model with one sequence, on one thread."""

    def __init__(self, path: Path, context: int = 2048) -> None:
        self._lib = _library()
        self.context = context
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"libllama cannot load {path}")
        params = self._lib.llama_context_default_params()
        for index in range(3):  # n_ctx, n_batch, n_ubatch
            params.words[index] = context
        self._ctx = self._lib.llama_init_from_model(self._model, params)
        sizes = [getattr(self._lib, name)(self._ctx) for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")]
        if sizes != [context] * 3:
            raise RuntimeError(f"libllama's parameters lie elsewhere: {sizes}")
        self._lib.llama_set_n_threads(self._ctx, 1, 1)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def logits(self, tokens: Sequence[int], position: int = 0) -> NDArray[np.float32]:
        """Logits of each token, [tokens, vocab_size]; the positions before `position` stay as they were."""
        return self._decode(tokens, position, every=True)

    def greedy(self, prompt: Sequence[int], count: int, chunk: int = 0) -> tuple[list[int], NDArray[np.float32]]:
        """The tokens that follow, and the logits that each was chosen by, [count, vocab_size].

        chunk: most tokens of the prompt in one batch; 0 for all of it.
        """
        chunk = chunk or len(prompt)
        for start in range(0, len(prompt), chunk):
            row = self._decode(prompt[start : start + chunk], start, every=False)[0]
        rows, tokens = [row], [int(row.argmax())]
        while len(tokens) < count:
            rows.append(self._decode(tokens[-1:], len(prompt) + len(tokens) - 1, every=False)[0])
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.stack(rows)

    def embedding(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The hidden state of the last token, behind the output norm: [hidden_size]."""
        self._lib.llama_set_embeddings(self._ctx, True)
        self._decode(tokens, 0, every=False)
        row = self._lib.llama_get_embeddings_ith(self._ctx, -1)
        found: NDArray[np.float32] = np.ctypeslib.as_array(row, (self._lib.llama_model_n_embd(self._model),)).copy()
        self._lib.llama_set_embeddings(self._ctx, False)
        return found

    def _decode(self, tokens: Sequence[int], position: int, every: bool) -> NDArray[np.float32]:
        """Run a batch, with logits of every token or of the last one."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._ctx), 0, position, -1)
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == len(tokens) - 1
        status = self._lib.llama_decode(self._ctx, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        wanted = range(len(tokens)) if every else [-1]
        rows = [self._lib.llama_get_logits_ith(self._ctx, index) for index in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])

    def close(self) -> None:
        self._lib.llama_free(self._ctx)
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
    pointer, floats = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
    for name, result, *arguments in (
        ("llama_backend_init", None),
        ("llama_log_set", None, _LOG_CALLBACK, pointer),
        ("llama_model_default_params", _Params),
        ("llama_context_default_params", _Params),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, _Params),
        ("llama_init_from_model", pointer, pointer, _Params),
        ("llama_n_ctx", ctypes.c_uint32, pointer),
        ("llama_n_batch", ctypes.c_uint32, pointer),
        ("llama_n_ubatch", ctypes.c_uint32, pointer),
        ("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", ctypes.c_int32, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_seq_rm", ctypes.c_bool, pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_batch_init", _Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", ctypes.c_int32, pointer, _Batch),
        ("llama_get_logits_ith", floats, pointer, ctypes.c_int32),
        ("llama_set_embeddings", None, pointer, ctypes.c_bool),
        ("llama_get_embeddings_ith", floats, pointer, ctypes.c_int32),
        ("llama_model_n_embd", ctypes.c_int32, pointer),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_quiet, None)
    lib.llama_backend_init()
    return lib
