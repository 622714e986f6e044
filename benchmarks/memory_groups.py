"""Memory control groups, version 2 or 1, whichever of the two this machine has the memory controller on."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def make_group(name: str, limit_bytes: int) -> Path:
    """A group that may use so much memory, page cache included, and no swap. A process joins by its cgroup.procs.

    Raises OSError where none can be made, FileExistsError for a name that is taken.
    """
    if (_ROOT / "cgroup.controllers").exists():
        return _make_v2(name, limit_bytes)
    parent = _ROOT / "memory" / _own_v1_group().lstrip("/")
    if not (parent / "memory.limit_in_bytes").exists():
        parent = _ROOT / "memory"
    group = parent / name
    group.mkdir()
    _set(group / "memory.limit_in_bytes", str(limit_bytes))
    return group


def peak_bytes(group: Path) -> int:
    """The most that a group has used."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if (group / name).exists():
            return int((group / name).read_text())
    raise OSError(f"{group} does not count its peak")


def kills(group: Path) -> int:
    """How many processes of a group were killed for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            counts = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    raise OSError(f"{group} does not count its kills")


def _make_v2(name: str, limit_bytes: int) -> Path:
    """Directly below the root: a group that holds processes cannot have groups with limits below it."""
    controllers = (_ROOT / "cgroup.subtree_control").read_text().split()
    if "memory" not in controllers:
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    group = _ROOT / name
    group.mkdir()
    _set(group / "memory.max", str(limit_bytes))
    if (group / "memory.swap.max").exists():
        _set(group / "memory.swap.max", "0")
    return group


def _own_v1_group() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path
    raise OSError("this kernel has no memory controller for control groups")


def _set(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError:
        path.parent.rmdir()
        raise
