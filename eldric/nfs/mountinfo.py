"""What is mounted here, from /proc/self/mountinfo (proc(5)). Nothing in here touches a file system that may hang."""

import os
import re
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eldric.nfs.address import NFS_PORT, NfsAddress

MOUNTINFO = Path("/proc/self/mountinfo")

#: File systems whose files come over a network, or through a process: reading one may hang for as long as that does.
_REMOTE = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "virtiofs", "fuse")
)
_MAX_LINKS = 40  # as the kernel follows


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    point: str  # where it is mounted
    root: str  # the folder of the file system that is seen there
    kind: str  # "ext4", "nfs4", "fuse.sshfs", ...
    source: str  # the device, or "host:/path"
    options: tuple[str, ...]  # of the file system

    @property
    def is_remote(self) -> bool:
        """Whether reading from it may hang or fail because another machine or process does."""
        return self.kind.split(".")[0] in _REMOTE

    def option(self, name: str) -> str:
        """The value of an option; empty if it is not there."""
        return next((each[len(name) + 1 :] for each in self.options if each.startswith(f"{name}=")), "")


def mounts(text: str | None = None) -> list[Mount]:
    """All mounts, the newest last. text: of a mountinfo file; None: this process's own. Empty where there is none."""
    if text is None:
        try:
            text = MOUNTINFO.read_text(errors="surrogateescape")
        except OSError:
            return []
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        head, tail = before.split(" "), after.split(" ")
        if separator and len(head) >= 6 and len(tail) >= 3:
            found.append(Mount(_plain(head[4]), _plain(head[3]), tail[0], _plain(tail[1]), tuple(tail[2].split(","))))
    return found


def remote_mount(path: Path, among: Iterable[Mount] | None = None) -> Mount | None:
    """The mount that a path lies on, if reading there may hang; None for local files.

    Links are followed up to where such a mount begins, and not looked at beyond it.
    """
    points = {mount.point: mount for mount in (mounts() if among is None else among)}  # the newest covers others
    todo, at, links = _parts(os.path.abspath(path)), "/", 0
    while True:
        covering = _covering(at, points)
        if covering is not None and covering.is_remote:
            whole = os.path.normpath(os.path.join(at, *todo))
            inner = _covering(whole, points)
            if inner is None or inner is covering:
                return covering
            at, todo = inner.point, _parts(os.path.relpath(whole, inner.point))  # mounted deeper within it
            continue
        if not todo:
            return None
        name, todo = todo[0], todo[1:]
        step = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        target = None if step in points or name == ".." or links == _MAX_LINKS else _link(step)
        if target is None:
            at = step
        else:
            links, todo = links + 1, _parts(target) + todo
            at = "/" if target.startswith("/") else at


def folders_of(export: NfsAddress, among: Iterable[Mount]) -> list[Path]:
    """The folders in which mounts of an export, or of one that contains it, show its files; the newest first."""
    found = []
    for mount in among:
        inside = _inside(mount, export)
        if inside is not None:
            found.append(Path(mount.point, inside))
    return found[::-1]


def _inside(mount: Mount, export: NfsAddress) -> str | None:
    """The export's folder, relative to where a mount shows it; None if it does not."""
    if mount.source == str(export):  # by `eldric-cli mount`
        return mount.root.lstrip("/")
    if mount.kind not in ("nfs", "nfs4"):
        return None
    host, separator, path = mount.source.partition(":/")
    if not separator or int(mount.option("port") or NFS_PORT) != export.port:
        return None
    if host.strip("[]") != export.host and mount.option("addr") not in _addresses(export.host):
        return None
    shown = PurePosixPath("/", path, mount.root.lstrip("/"))
    try:
        return str(PurePosixPath(export.path).relative_to(shown))
    except ValueError:
        return None


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return {host}


def _covering(path: str, points: dict[str, Mount]) -> Mount | None:
    for folder in (path, *map(str, PurePosixPath(path).parents)):
        if folder in points:
            return points[folder]
    return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _link(path: str) -> str | None:
    """Where a symbolic link leads; None for what is none, or is not there."""
    try:
        return os.readlink(path) if stat.S_ISLNK(os.lstat(path).st_mode) else None
    except OSError:
        return None


def _plain(field: str) -> str:
    """mountinfo writes blanks and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
