"""A shard's weights in a device's memory: the mapped file itself where the device can use it, copies elsewhere."""

import ctypes
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from eldric.engine.errors import LoadCancelled, UnsupportedModel
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.backend import WEIGHTS, Backend, Buffer
from eldric.engine.ggml.lookup import TokenTable
from eldric.engine.ggml.mapping import Fetch, Mapping, Mappings, read_in
from eldric.engine.ggml.policy import MAPPED, PANELS, keeps_mapped, packed_pays, worth_packing
from eldric.engine.ggml.structs import MAX_DIMS, Tensor
from eldric.engine.gguf import ModelFile
from eldric.engine.kernels.panels import Panel, Panels, panel_bytes
from eldric.engine.shard import Shard
from eldric.engine.tensor_types import TensorType
from eldric.engine.tensors import TensorInfo

WeightsMode = Literal["auto", "mapped", "repacked"]
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Weight:
    """One tensor: its structs in the file's layout and in one of the device's own, 0 where there is none; or panels."""

    info: TensorInfo
    plain: int = 0
    packed: int = 0
    packing: str = ""  # the packed one's buffer type
    panel: Panel | None = None

    def matrix(self, rows: int) -> int:
        """The tensor for a product of so many rows."""
        if self.plain and self.packed:
            return self.packed if packed_pays(self.info.type, self.packing, rows) else self.plain
        return self.packed or self.plain

    @property
    def layout(self) -> str:
        """That of the packed tensor if there is one."""
        if self.panel is not None:
            return PANELS
        return self.packing if self.packed else MAPPED


class Weights:
    """The tensors of a shard by name. `place` lays them out, `bring_in` fills them; nothing changes afterwards."""

    def __init__(
        self, backend: Backend, model: ModelFile, shard: Shard, fetch: Fetch | None = None, lock: bool = False
    ) -> None:
        """fetch: brings bytes of the files into the page cache before they are mapped. lock: keep the pages that are
        computed with from being evicted, as far as the process may."""
        self._backend, self._api, self._shard = backend, backend.api, shard
        self._fetch, self._lock = fetch, lock
        self._by_name: dict[str, Weight] = {}
        self.token_table: TokenTable | None = None  # for a device that cannot look rows up in the embedding
        self._buffers: list[Buffer] = []
        self._arenas: list[Arena] = []
        self._panels: Panels | None = None
        self._mappings = Mappings(model.paths, model.file_sizes, shard.ranges)
        self.mapped_bytes = 0
        self.locked_bytes = 0
        self.packed_bytes = 0
        self.copied_bytes = 0
        self.scratch_bytes = 0

    def __getitem__(self, name: str) -> Weight:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def place(
        self, mode: WeightsMode, matrices: frozenset[str], looked_up: str | None, pack_budget_bytes: int | None
    ) -> None:
        """Choose a layout for each tensor and take its memory. Reads nothing of the files.

        matrices: names of the tensors that are multiplied with. looked_up: the token embedding if rows of it are
        read, for which it must keep the file's layout. Raises OutOfMemory or UnsupportedModel.
        """
        infos = self._in_file_order()
        for info in infos:
            if self._api.ggml_type_name(int(info.type)) in (None, b"NONE"):
                raise UnsupportedModel(f"ggml {self._backend.library.version} has no type {info.type.name}")
        self._by_name = {info.name: Weight(info) for info in infos}
        budget = pack_budget_bytes
        if mode == "auto" and self._backend.is_cpu and self._backend.is_host:
            budget = self._pack_panels([info for info in infos if info.name in matrices], budget)
        if mode != "mapped":
            left = [info for info in infos if info.name in matrices and self._by_name[info.name].panel is None]
            self._pack(left, mode, budget)
        if looked_up is not None and not self._can_look_up(self._shard.tensors[looked_up]):
            info, looked_up = self._shard.tensors[looked_up], None
            self.token_table = TokenTable(self._backend.library, info, self._address(info))
            self.mapped_bytes += info.nbytes
        plain = [info for info in infos if self._wants_plain(info, mode, matrices, looked_up)]
        if self._backend.can_map and not (mode == "auto" and self._copies_rest(plain, pack_budget_bytes)):
            self._place_over_file(plain)
        else:
            self._place_in_device(plain)

    def bring_in(self, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        """Read each tensor's pages, in the order of the file, copy where a copy is due, and let go of pages that no
        struct lies over.

        progress gets (bytes done, bytes of the shard) many times. Raises ModelUnreadable or LoadCancelled.
        """
        infos = self._in_file_order()
        done, total = 0, sum(info.nbytes for info in infos)

        def on_piece(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)
            if cancelled is not None and cancelled():
                raise LoadCancelled(f"loading was cancelled after {done} of {total} bytes")

        for info in infos:
            self._bring_one_in(info, on_piece)
        if not self.mapped_bytes:
            self._mappings.close()

    def take_scratch(self, rows: int) -> None:
        """Memory that products of up to so many rows need besides. Raises OutOfMemory."""
        if self._panels is not None:
            self._panels.take_scratch(rows, self._backend.threads)
            self.scratch_bytes = self._panels.scratch_bytes

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        if self._panels is not None:
            self._panels.close()
        for arena in self._arenas:
            arena.close()
        self._mappings.close()
        self._by_name.clear()

    def _can_look_up(self, info: TensorInfo) -> bool:
        with closing(Arena(self._api, 4)) as arena:
            ids = self._api.ggml_new_tensor_1d(arena.ctx, int(TensorType.I32), 1)
            return self._backend.supports(self._api.ggml_get_rows(arena.ctx, self._struct(arena, info), ids))

    def _wants_plain(
        self, info: TensorInfo, mode: WeightsMode, matrices: frozenset[str], looked_up: str | None
    ) -> bool:
        weight = self._by_name[info.name]
        if info.name == looked_up:
            return True
        if self.token_table is not None and info is self.token_table.info and info.name not in matrices:
            return False
        if weight.panel is not None:
            return False
        if not weight.packed:
            return True
        return mode == "auto" and keeps_mapped(info.type, weight.packing)

    def _copies_rest(self, plain: list[TensorInfo], budget: int | None) -> bool:
        """Whether what was not packed is copied too: where it is the smaller part, so that the stage needs the file
        no more, and no page of it can be cut, or fail to come again. Locked pages are safe where they are."""
        nbytes = sum(info.nbytes for info in plain)
        return (
            not self._lock and nbytes <= self.packed_bytes and (budget is None or self.packed_bytes + nbytes <= budget)
        )

    def _pack_panels(self, infos: list[TensorInfo], budget: int | None) -> int | None:
        """Choose the matrices that the engine's own kernels multiply, and take their memory. Returns what is left."""
        chosen: list[TensorInfo] = []
        for info in infos:
            nbytes = panel_bytes(info)
            if nbytes is not None and (budget is None or nbytes <= budget):
                chosen.append(info)
                budget = None if budget is None else budget - nbytes
        if chosen:
            self._panels = Panels(chosen)
            self.packed_bytes += self._panels.nbytes
            for info in chosen:
                self._by_name[info.name].panel = self._panels[info.name]
        return budget

    def _pack(self, infos: list[TensorInfo], mode: WeightsMode, budget: int | None) -> None:
        """Make the structs of the matrices that get a copy in a layout of the device's own, and their buffers.

        ggml lists the device's layouts from the most special one on; a matrix gets the first that fits.
        """
        for buffer_type in self._backend.extra_buffer_types():
            packing = self._api.ggml_backend_buft_name(buffer_type).decode()
            chosen: list[TensorInfo] = []
            for info in infos:
                if self._by_name[info.name].packed or (mode == "auto" and not worth_packing(info.type, packing)):
                    continue
                nbytes = self._packed_size(buffer_type, info)
                if nbytes is not None and (budget is None or nbytes <= budget):
                    chosen.append(info)
                    budget = None if budget is None else budget - nbytes
            if chosen:
                arena = self._arena(len(chosen))
                for info in chosen:
                    weight = self._by_name[info.name]
                    weight.packed, weight.packing = self._struct(arena, info), packing
                self.packed_bytes += self._allocate(arena, f"weights in {packing} layout", buffer_type).nbytes

    def _packed_size(self, buffer_type: int, info: TensorInfo) -> int | None:
        """Bytes that a matrix takes in such a buffer, or None if the device does not multiply with it there."""
        api = self._api
        with closing(Arena(api, 4)) as arena:
            matrix = self._struct(arena, info)
            handle = api.ggml_backend_buft_alloc_buffer(buffer_type, 0)
            if not handle:
                return None
            Tensor.from_address(matrix).buffer = handle
            rows = api.ggml_new_tensor_2d(arena.ctx, int(TensorType.F32), info.shape[0], 8)
            supported = self._backend.supports(api.ggml_mul_mat(arena.ctx, matrix, rows))
            api.ggml_backend_buffer_free(handle)
            return api.ggml_backend_buft_get_alloc_size(buffer_type, matrix) if supported else None

    def _place_over_file(self, infos: list[TensorInfo]) -> None:
        """Structs whose data is the mapped file. A tensor at an offset that the device cannot use gets a copy."""
        alignment = self._backend.alignment
        aligned = [info for info in infos if info.offset % alignment == 0]
        arena = self._arena(len(aligned))
        buffers: dict[int, Buffer] = {}
        for info in aligned:
            mapping = self._mapping(info)
            if mapping.address not in buffers:
                buffers[mapping.address] = self._backend.wrap(mapping.address, mapping.nbytes)
                self._buffers.append(buffers[mapping.address])
            tensor = self._struct(arena, info)
            self._api.ggml_backend_tensor_alloc(buffers[mapping.address].handle, tensor, self._address(info))
            self._by_name[info.name].plain = tensor
            self.mapped_bytes += info.nbytes
        if len(aligned) < len(infos):
            self._place_in_device([info for info in infos if info.offset % alignment])

    def _place_in_device(self, infos: list[TensorInfo]) -> None:
        if infos:
            arena = self._arena(len(infos))
            for info in infos:
                self._by_name[info.name].plain = self._struct(arena, info)
            self.copied_bytes += self._allocate(arena, "weights").nbytes

    def _in_file_order(self) -> list[TensorInfo]:
        return sorted(self._shard.tensors.values(), key=lambda info: (info.file, info.offset))

    def _bring_one_in(self, info: TensorInfo, on_piece: Callable[[int], None]) -> None:
        weight, mapping = self._by_name[info.name], self._mapping(info)
        read_in(mapping, info.offset, info.nbytes, on_piece, self._fetch)
        address = self._address(info)
        in_place = bool(weight.plain) and self._api.ggml_get_data(weight.plain) == address
        if weight.panel is not None:
            weight.panel.pack(address)
        copies = [weight.packed] if in_place else [weight.packed, weight.plain]
        for tensor in filter(None, copies):
            self._api.ggml_backend_tensor_set(tensor, address, 0, info.nbytes)
        if in_place or (self.token_table is not None and info is self.token_table.info):
            self._keep(mapping, info)
        else:
            mapping.drop(info.offset, info.nbytes)

    def _keep(self, mapping: Mapping, info: TensorInfo) -> None:
        if self._lock:
            self._lock = mapping.lock(info.offset, info.nbytes)
            self.locked_bytes += info.nbytes if self._lock else 0

    def _mapping(self, info: TensorInfo) -> Mapping:
        return self._mappings.of(info.file, info.offset, info.nbytes)

    def _address(self, info: TensorInfo) -> int:
        """Where the file's bytes of a tensor lie in memory."""
        mapping = self._mapping(info)
        return mapping.address + info.offset - mapping.offset

    def _arena(self, tensors: int) -> Arena:
        arena = Arena(self._api, tensors)
        self._arenas.append(arena)
        return arena

    def _allocate(self, arena: Arena, what: str, buffer_type: int | None = None) -> Buffer:
        buffer = self._backend.allocate(arena, what, buffer_type)
        self._api.ggml_backend_buffer_set_usage(buffer.handle, WEIGHTS)
        self._buffers.append(buffer)
        return buffer

    def _struct(self, arena: Arena, info: TensorInfo) -> int:
        sizes = (ctypes.c_int64 * MAX_DIMS)(*info.shape)
        tensor: int = self._api.ggml_new_tensor(arena.ctx, int(info.type), len(info.shape), sizes)
        return tensor
