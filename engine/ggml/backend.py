"""One ggml device at work: its threads, its buffers, and the call that computes a graph."""

import ctypes
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from eldric.engine.errors import EngineError, LibraryError, OutOfMemory
from eldric.engine.ggml.arena import Arena
from eldric.engine.ggml.library import Library
from eldric.engine.ggml.structs import MAX_THREADS, ThreadpoolParams
from eldric.engine.shard import KV_PADDING

log = logging.getLogger(__name__)

WEIGHTS = 1  # enum ggml_backend_buffer_usage
_ALLOC_FAILED, _SUCCESS = -2, 0  # enum ggml_status
_PAGE, _HUGE_PAGE = mmap.PAGESIZE, 2 << 20
_MADV_HUGEPAGE = 14


class Buffer:
    """Memory of a device, or memory of the process that the device was given."""

    def __init__(self, backend: "Backend", handle: int) -> None:
        self._backend = backend
        self.handle = handle
        self.nbytes: int = backend.api.ggml_backend_buffer_get_size(handle)

    def close(self) -> None:
        if self.handle:
            self._backend.api.ggml_backend_buffer_free(self.handle)
            self.handle = 0


class Backend:
    """Computes graphs on a device, always from one thread, which is pinned when `cpus` are given."""

    def __init__(self, library: Library, device: str, threads: int, cpus: tuple[int, ...] | None = None) -> None:
        """threads counts the calling one. Raises LibraryError for an unknown device."""
        if not 1 <= threads <= MAX_THREADS:
            raise LibraryError(f"{threads} threads are not between 1 and {MAX_THREADS}")
        if cpus is not None and not (cpus and all(0 <= cpu < MAX_THREADS for cpu in cpus)):
            raise LibraryError(f"CPUs {cpus} are not all between 0 and {MAX_THREADS - 1}")
        self.library, self.api = library, library.api
        self.device = library.device(device)
        self.is_cpu = self.device.kind == "cpu"
        self.can_map = self.device.host_pointers  # use memory that the process has mapped, without a copy
        self.threads = threads if self.is_cpu else 1
        # Kernels of other devices want whole blocks of keys, and a mask that hides what lies beyond the last one.
        self.cell_multiple = 1 if self.is_cpu else KV_PADDING
        self.buffer_type: int = self.api.ggml_backend_dev_buffer_type(self.device.handle)
        self.is_host: bool = self.api.ggml_backend_buft_is_host(self.buffer_type)
        self.alignment: int = self.api.ggml_backend_buft_get_alignment(self.buffer_type)  # of tensors, in bytes
        self.compute_ns = 0  # spent in all computations so far
        self._cpus = None if cpus is None else tuple(sorted(set(cpus)))
        self._pinned_thread = 0
        self._threadpool: int | None = None
        self._handle: int = self.api.ggml_backend_dev_init(self.device.handle, None) or 0
        if not self._handle:
            raise LibraryError(f"device {self.device.name} does not start")
        self._compute = self.api.ggml_backend_graph_compute
        if self.is_cpu:
            self._function("ggml_backend_set_n_threads", None, ctypes.c_void_p, ctypes.c_int)(self._handle, threads)
        self._undivided = False
        self._use_reference: Callable[..., Any] | None = None
        if self.is_cpu and threads > 1:
            # What ggml calls its reference implementation differs in a decode step in this alone, and in not fusing.
            self._use_reference = self._function("ggml_backend_cpu_set_use_ref", None, ctypes.c_void_p, ctypes.c_bool)
            self._start_threads()

    def compute(self, graph: int, undivided: bool = False) -> None:
        """Compute a graph whose tensors have memory.

        undivided: no row's attention is divided among threads, which would make its bits depend on their number.
        Raises OutOfMemory or EngineError; the results are undefined then.
        """
        if self._cpus and self._pinned_thread != threading.get_ident():
            self._pin()
        if undivided != self._undivided and self._use_reference is not None:
            self._use_reference(self._handle, undivided)
            self._undivided = undivided
        began = time.perf_counter_ns()
        status = self._compute(self._handle, graph)
        self.compute_ns += time.perf_counter_ns() - began
        if status != _SUCCESS:
            if status == _ALLOC_FAILED:
                raise OutOfMemory(f"{self.device.name} has no memory left for a step's scratch space")
            raise EngineError(f"{self.device.name} failed to compute a step (ggml status {status})")

    def allocate(self, arena: Arena, what: str, buffer_type: int | None = None) -> Buffer:
        """Give every tensor of an arena its memory, in one buffer. Raises OutOfMemory that says what for."""
        handle = self.api.ggml_backend_alloc_ctx_tensors_from_buft(arena.ctx, buffer_type or self.buffer_type)
        if not handle:
            raise OutOfMemory(f"{self.device.name} cannot hold the {what}")
        buffer = Buffer(self, handle)
        if self.is_host:
            _prefer_huge_pages(self.api.ggml_backend_buffer_get_base(handle), buffer.nbytes)
        return buffer

    def supports(self, operation: int) -> bool:
        """Whether the device computes an operation, given as its result's tensor. ggml aborts where it does not."""
        supported: bool = self.api.ggml_backend_dev_supports_op(self.device.handle, operation)
        return supported

    def wrap(self, address: int, nbytes: int) -> Buffer:
        """A buffer over memory that the process has mapped: for devices with `host_pointers`."""
        handle = self.api.ggml_backend_dev_buffer_from_host_ptr(self.device.handle, address, nbytes, nbytes)
        if not handle:
            raise OutOfMemory(f"{self.device.name} cannot use {nbytes} mapped bytes")
        self.api.ggml_backend_buffer_set_usage(handle, WEIGHTS)
        return Buffer(self, handle)

    def extra_buffer_types(self) -> tuple[int, ...]:
        """Buffer types that hold weights in layouts of their own, the CPU's repacked one among them."""
        function = self.library.proc_address(self.device.handle, "ggml_backend_dev_get_extra_bufts")
        if function is None:
            return ()
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(function)(self.device.handle)
        found: list[int] = []
        while (kind := listed[len(found)]) is not None:  # ends with NULL
            found.append(kind)
        return tuple(found)

    def close(self) -> None:
        if self._threadpool is not None:
            self._function("ggml_backend_cpu_set_threadpool", None, ctypes.c_void_p, ctypes.c_void_p)(
                self._handle, None
            )
            self._function("ggml_threadpool_free", None, ctypes.c_void_p)(self._threadpool)
            self._threadpool = None
        if self._handle:
            self.api.ggml_backend_free(self._handle)
            self._handle = 0

    def _start_threads(self) -> None:
        """A pool of our own, because ggml would start and end threads in every step. Idle threads sleep at once:
        other stages on the machine need the cores."""
        params = ThreadpoolParams()
        self.api.ggml_threadpool_params_init(ctypes.byref(params), self.threads)
        params.poll = 0
        if self._cpus:
            params.strict_cpu = len(self._cpus) >= self.threads
            for cpu in self._cpus:
                params.cpumask[cpu] = True
        before = _affinity()
        self._threadpool = self._function("ggml_threadpool_new", ctypes.c_void_p, ctypes.c_void_p)(ctypes.byref(params))
        _set_affinity(before)  # the pool pins the thread that makes it, which need not be the one that computes
        self._function("ggml_backend_cpu_set_threadpool", None, ctypes.c_void_p, ctypes.c_void_p)(
            self._handle, self._threadpool
        )

    def _pin(self) -> None:
        """Pin the computing thread: to the last of the CPUs when the pool's threads have the others."""
        assert self._cpus is not None
        alone = self.threads > 1 and len(self._cpus) >= self.threads
        _set_affinity({self._cpus[self.threads - 1]} if alone else set(self._cpus))
        self._pinned_thread = threading.get_ident()

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        address = self.library.proc_address(self.device.handle, name)
        if address is None:
            raise LibraryError(f"device {self.device.name} has no {name}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)


def _prefer_huge_pages(address: int, nbytes: int) -> None:
    """Weights are read from end to end in every step: with pages of 2 MiB, decoding is 5 to 15 % faster."""
    if sys.platform == "linux" and nbytes >= _HUGE_PAGE:
        start, stop = -(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, stop - start, _MADV_HUGEPAGE)  # refused where the kernel has none: nothing is lost


def _affinity() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _set_affinity(cpus: set[int] | None) -> None:
    if cpus is not None and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            log.warning("pinning_failed cpus=%s reason=%s", sorted(cpus), error)
