"""Packed matrices of a shard: their memory, what `product` is told of each, and the scratch memory of its threads."""

import ctypes
import mmap
from collections.abc import Sequence

from eldric.engine.kernels.compiler import Kernels, kernels_for
from eldric.engine.kernels.memory import private_memory
from eldric.engine.kernels.product import PASS_ROWS, TASK, Task
from eldric.engine.tensors import TensorInfo

_ALIGNMENT = 64
_PACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p)


def panel_bytes(info: TensorInfo) -> int | None:
    """Bytes of a matrix in panels; None if there are no kernels for it here."""
    kernels = _kernels_of(info)
    if kernels is None:
        return None
    columns, rows = info.shape
    return rows // kernels.layout.lanes * (columns // kernels.layout.block) * kernels.layout.block_bytes


class Panel:
    """One packed matrix. product, task: the function and the user data of a ggml_custom_4d that multiplies with it."""

    def __init__(self, info: TensorInfo, kernels: Kernels, address: int) -> None:
        columns, self.rows = info.shape
        self._kernels = kernels
        self._row_bytes = info.type.row_bytes(columns)
        self._blocks = columns // kernels.layout.block
        self.scratch_row_bytes = self._blocks * kernels.layout.tile_row_bytes
        self._task = (ctypes.c_int64 * len(Task._fields))()
        self.product = kernels.product
        self.task = ctypes.addressof(self._task)
        self.set(panels=address, panel_count=self.rows // kernels.layout.lanes, blocks=self._blocks)

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._task[getattr(TASK, name) // 8] = value

    def pack(self, source: int) -> None:
        """Fill it from the file's bytes of the matrix, in memory at `source`."""
        panels = self._task[TASK.panel_count // 8]
        _PACK(self._kernels.pack)(source, self._row_bytes, self._blocks, panels, self._task[TASK.panels // 8])


class Panels:
    """All packed matrices of a shard, by name."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        """infos: matrices whose `panel_bytes` are not None. Takes their memory. Raises OutOfMemory."""
        sizes = [-(-(panel_bytes(info) or 0) // _ALIGNMENT) * _ALIGNMENT for info in infos]
        self.nbytes, self.scratch_bytes = sum(sizes), 0
        self._memory, address = private_memory(self.nbytes, "weights in panels")
        self._scratch: mmap.mmap | None = None
        self._by_name: dict[str, Panel] = {}
        for info, nbytes in zip(infos, sizes, strict=True):
            kernels = _kernels_of(info)
            assert kernels is not None
            self._by_name[info.name] = Panel(info, kernels, address)
            address += nbytes

    def __getitem__(self, name: str) -> Panel:
        return self._by_name[name]

    def take_scratch(self, rows: int, threads: int) -> None:
        """Memory for the activations of steps of up to so many rows. Raises OutOfMemory."""
        widest = max(panel.scratch_row_bytes for panel in self._by_name.values())
        of_thread = -(-widest * min(rows, PASS_ROWS) // _ALIGNMENT) * _ALIGNMENT
        self.scratch_bytes = of_thread * threads
        self._scratch, address = private_memory(self.scratch_bytes, "activations of a step")
        for panel in self._by_name.values():
            panel.set(scratch=address, scratch_bytes=of_thread)

    def close(self) -> None:
        self._by_name.clear()
        for memory in (self._memory, self._scratch):
            if memory is not None:
                memory.close()


def _kernels_of(info: TensorInfo) -> Kernels | None:
    kernels = kernels_for(info.type)
    if kernels is None or info.shape[0] % kernels.layout.block or info.shape[1] % kernels.layout.lanes:
        return None
    return kernels
