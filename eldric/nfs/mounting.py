"""Mounts an export where this machine may: with the kernel's own NFS client, or through FUSE."""

import contextlib
import ctypes.util
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from eldric.errors import DeadlineExceeded, NotReady, Unavailable
from eldric.nfs.address import NfsAddress
from eldric.nfs.mountinfo import mounts

log = logging.getLogger(__name__)

#: Longest wait for a mount to be there, in seconds.
MOUNT_S = 10.0
#: Soft: an outage is an error after some seconds, never a hang for ever.
KERNEL_OPTIONS = "ro,soft,nosuid,nodev,noexec,noatime,timeo=20,retrans=1"

_POLL_S = 0.05


def kernel_can() -> bool:
    """Whether this process may mount with the kernel's NFS client, which may be a module that is not loaded yet."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    if not _kernel_knows() and (modprobe := shutil.which("modprobe")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([modprobe, "-q", "nfsv4"], capture_output=True, timeout=MOUNT_S)
    return _kernel_knows()


def fuse_problem() -> str:
    """Why the FUSE client cannot be used here; empty when it can."""
    missing = [name for name in ("mfusepy", "nfs_rs") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the FUSE client needs {' and '.join(missing)}: `pip install eldric[fuse]`"
    if not any(map(ctypes.util.find_library, ("fuse", "fuse3"))):
        return "the FUSE client needs libfuse: `apt-get install fuse3`, or `dnf install fuse3-libs`"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "the FUSE client needs /dev/fuse, which is not there or may not be used"
    return ""


class OwnMounts:
    """The mounts that a process makes for itself, below a folder of its own. Thread-safe for one caller at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clients: dict[NfsAddress, subprocess.Popen[bytes]] = {}
        self._made: dict[NfsAddress, Path] = {}

    def mount(self, export: NfsAddress) -> Path:
        """Mounts an export and returns where. What is mounted already is not mounted twice.

        Raises NotReady when this machine cannot mount, Unavailable when the server is not reached, DeadlineExceeded.
        """
        known = self._made.get(export)
        if known is not None and any(mount.point == str(known) for mount in mounts()):
            return known
        kernel = kernel_can()
        if not kernel and (problem := fuse_problem()):
            raise NotReady(f"{export} is not mounted, and cannot be mounted from here: {problem}")
        _reach(export)
        place = self._place(export)
        if kernel:
            _kernel_mount(export, place)
        else:
            self._clients[export] = _start_client(export, place)
        self._made[export] = place
        log.info("event=mounted export=%s folder=%s by=%s", export, place, "kernel" if kernel else "fuse")
        return place

    def close(self) -> None:
        """Unmounts everything. Mappings that are still open keep their pages."""
        for export, place in self._made.items():
            client = self._clients.get(export)
            if client is not None:
                _end(client)
            unmount(place)
            _log_of(place).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                place.rmdir()
        self._made.clear()
        self._clients.clear()

    def _place(self, export: NfsAddress) -> Path:
        safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in f"{export}"[6:])
        place = self._folder.absolute() / safe[:200]
        if any(mount.point == str(place) for mount in mounts()):
            unmount(place)  # of an earlier process that was killed
        place.mkdir(parents=True, exist_ok=True)
        return place


def _log_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def unmount(place: Path) -> None:
    """Takes a mount away, even if its server hangs or it is in use; no error where there is none."""
    programs = [["umount", "-l"]] if os.geteuid() == 0 else [["fusermount3", "-uz"], ["fusermount", "-uz"]]
    for program, flags in programs:
        if found := shutil.which(program):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run([found, flags, str(place)], capture_output=True, timeout=MOUNT_S)
            return


def _kernel_knows() -> bool:
    try:
        return any(line.split()[-1] == "nfs4" for line in Path("/proc/filesystems").read_text().splitlines() if line)
    except OSError:
        return False


def _reach(export: NfsAddress) -> None:
    """A mount of a server that is not there takes minutes to fail. Raises Unavailable."""
    try:
        socket.create_connection((export.host, export.port), timeout=2.0).close()
    except OSError as error:
        raise Unavailable(f"{export} is not reached: {error.strerror or error}") from error


def _kernel_mount(export: NfsAddress, place: Path) -> None:
    address = socket.getaddrinfo(export.host, export.port, type=socket.SOCK_STREAM)[0][4][0]
    options = f"{KERNEL_OPTIONS},vers=4.1,proto=tcp{6 if ':' in str(address) else ''},port={export.port},addr={address}"
    host = f"[{export.host}]" if ":" in export.host else export.host
    command = ["mount", "-i", "-t", "nfs4", "-o", options, f"{host}:{export.path}", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOUNT_S)
    except FileNotFoundError:
        raise NotReady("there is no `mount` program here") from None
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"mounting {export} took longer than {MOUNT_S:.0f} s") from None
    if done.returncode:
        raise NotReady(f"{export} cannot be mounted: {' '.join(done.stderr.split())}")


def _start_client(export: NfsAddress, place: Path) -> "subprocess.Popen[bytes]":
    """Our FUSE client, in a process of its own: whatever becomes of it, this process only sees failing reads."""
    command, said = [sys.executable, "-m", "eldric.nfs.client", str(export), str(place)], _log_of(place)
    with said.open("wb") as stderr:
        client = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
    deadline = time.monotonic() + MOUNT_S
    while not any(mount.point == str(place) for mount in mounts()):
        if client.poll() is not None:
            lines = said.read_text(errors="replace").strip().splitlines()
            raise NotReady(f"{export} cannot be mounted: {lines[-1] if lines else 'the FUSE client ended'}")
        if time.monotonic() > deadline:
            _end(client)
            raise DeadlineExceeded(f"mounting {export} took longer than {MOUNT_S:.0f} s")
        time.sleep(_POLL_S)
    return client


def _end(client: "subprocess.Popen[bytes]") -> None:
    client.terminate()
    try:
        client.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        client.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.wait(timeout=2.0)
