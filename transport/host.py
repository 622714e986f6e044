"""Which processes share a machine, for transports that need it."""

import hashlib
import os
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = Path("/dev/shm")

#: Namespaces that tell containers of one machine apart: in different ones neither sockets nor process ids have the same
#: meaning (https://man7.org/linux/man-pages/man7/namespaces.7.html).
_NAMESPACES = ("net", "ipc", "pid")


def host_id() -> str:
    """Equal for processes that may reach each other without a network: one boot of one machine, the same namespaces,
    the same file system of shared memory. 16 hexadecimal digits, which say nothing of the machine itself.

    Two that have it in common may still be kept apart, by the permissions of their users for one.
    """
    parts = [_boot(), *(_namespace(name) for name in _NAMESPACES), _device(_SHARED_MEMORY)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


def _device(path: Path) -> str:
    """Every mount of a memory file system has a device number of its own."""
    try:
        return str(path.stat().st_dev)
    except OSError:
        return ""
