"""Private memory that kernels work on."""

import contextlib
import ctypes
import mmap
import sys

from eldric.engine.errors import OutOfMemory

_HUGE_PAGE = 2 << 20


def private_memory(nbytes: int, what: str) -> tuple[mmap.mmap, int]:
    """So many bytes, of huge pages where the system gives any, and their address on such a page's bound.

    Raises OutOfMemory that says what for.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform == "linux" else {}
    try:
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, **flags)
    except (OSError, MemoryError) as error:
        raise OutOfMemory(f"there are no {nbytes} bytes for the {what}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without any: nothing is lost
            memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-address // _HUGE_PAGE) * _HUGE_PAGE
