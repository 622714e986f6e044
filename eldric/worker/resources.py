"""What this machine can give, as it is registered."""

import contextlib
import os
import resource
import sys
from pathlib import Path, PurePosixPath

import psutil

from eldric.engine.ggml.library import Device, find_library
from eldric.transport.host import host_id
from eldric.transport.registry import UNENCRYPTED, offers
from eldric.v1 import registry_pb2
from eldric.worker.config import AUTO, WorkerConfig

_GROUPS = Path("/proc/self/cgroup")
_GROUP_ROOT = Path("/sys/fs/cgroup")


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the process's control group where that is less."""
    total = psutil.virtual_memory().total
    try:
        groups = _GROUPS.read_text()
    except OSError:
        return total
    return min([total, *group_limits(groups, _GROUP_ROOT)])


def group_limits(groups: str, root: Path) -> list[int]:
    """Limits of memory, in bytes, of control groups and of all groups above them, v2 and v1.

    groups: as /proc/PID/cgroup says; root: where control groups are mounted. A container sees its own group at the
    root, whatever the name that it is given.
    """
    limits = []
    for line in groups.splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            place, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            place, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(name)
        for each in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limits.append(int(place.joinpath(*each.parts[1:], file).read_text()))
    return limits


def compute_device(config: WorkerConfig) -> Device:
    """The device that stages are computed on. Raises LibraryError that lists the devices, for one that is not there.

    Graphics units that share the processor's memory are taken when they are named: few are faster than the processor.
    """
    library = find_library()
    if config.device != AUTO:
        return library.device(config.device)
    devices = library.devices()
    return next((device for device in devices if device.kind == "gpu"), devices[0])


def memory_budget(config: WorkerConfig) -> int:
    """Memory that stages may use in all, in bytes. Raises LibraryError."""
    if config.memory_bytes:
        return config.memory_bytes
    device = compute_device(config)
    total = device.memory_bytes if device.kind == "gpu" else machine_memory_bytes()
    return int(total * config.memory_share)


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
    """The worker's part of its registration. Raises LibraryError."""
    library = find_library()
    return registry_pb2.Resources(
        device=compute_device(config).name,
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
