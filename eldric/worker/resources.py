"""What this machine can give, as it is registered."""

import os
import resource
import sys
from pathlib import Path

import psutil

from eldric.engine.ggml.library import find_library
from eldric.transport.host import host_id
from eldric.transport.registry import UNENCRYPTED, offers
from eldric.v1 import registry_pb2
from eldric.worker.config import WorkerConfig

#: Limits of the control group that a process runs in, v2 and v1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the control group where that is less."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def memory_budget(config: WorkerConfig) -> int:
    """Memory that stages may use in all, in bytes."""
    return config.memory_bytes or machine_memory_bytes()


def lockable_bytes() -> int:
    """Memory that this process may lock, in bytes."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return sys.maxsize if limit == resource.RLIM_INFINITY or os.geteuid() == 0 else limit


def compute_threads(config: WorkerConfig) -> int:
    """Compute threads of a stage that does not ask for a number."""
    if config.threads:
        return config.threads
    if config.cpus is not None:
        return len(config.cpus)
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def resources(config: WorkerConfig) -> registry_pb2.Resources:
    """The worker's part of its registration."""
    library = find_library()
    return registry_pb2.Resources(
        cores=compute_threads(config),
        memory_bytes=memory_budget(config),
        devices=[
            registry_pb2.Device(name=device.name, description=device.description, memory_bytes=device.memory_bytes)
            for device in library.devices()
        ],
        engine=f"ggml {library.version}",
        cpu_variant=library.cpu_variant,
        transports=[scheme for scheme in offers() if config.trust_fabric or scheme not in UNENCRYPTED],
        host=host_id(),
    )
