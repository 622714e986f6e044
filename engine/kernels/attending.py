"""Attention of a stage: the kernel for its heads, and the scratch memory of its threads."""

import ctypes
from typing import Self

from eldric.engine.kernels.attention import TASK, Task, scratch
from eldric.engine.kernels.compiler import attention_kernel
from eldric.engine.kernels.memory import private_memory
from eldric.engine.tensor_types import TensorType

_ALIGNMENT = 64


class Attention:
    """function, task: the function and the user data of a ggml_custom_4d that attends."""

    def __init__(self, function: int, head_dim: int, threads: int) -> None:
        """Raises OutOfMemory."""
        of_thread = -(-scratch(head_dim).end // _ALIGNMENT) * _ALIGNMENT
        self.function, self.nbytes = function, of_thread * threads
        self._memory, address = private_memory(self.nbytes, "scratch memory of attention")
        self._task = (ctypes.c_int64 * len(Task._fields))()
        self._task[TASK.scratch // 8], self._task[TASK.scratch_bytes // 8] = address, of_thread
        self.task = ctypes.addressof(self._task)

    @classmethod
    def create(cls, head_dim: int, kind: TensorType, threads: int) -> Self | None:
        """kind: of keys and values. None if there is no kernel for them here. Raises OutOfMemory."""
        function = attention_kernel(head_dim, kind)
        return None if function is None else cls(function, head_dim, threads)

    def close(self) -> None:
        self._memory.close()
