"""nfs-ganesha, an NFS server in user space, as a child of this process."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eldric.data.export import ExportConfig, ganesha_configuration
from eldric.errors import AddressInUse, DeadlineExceeded, NotReady, PermissionDenied
from eldric.names import join_address

PROGRAM = "ganesha.nfsd"
INSTALL = "`apt-get install nfs-ganesha nfs-ganesha-vfs`, or `dnf install nfs-ganesha nfs-ganesha-vfs`"

#: Longest wait until it listens, and until it ended, in seconds.
START_S = 20.0
STOP_S = 10.0

_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ganesha:
    """A server that listens."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait(self) -> None:
        """Until it ends by itself, which it should not. Raises NotReady, with its last words."""
        self.process.wait()
        raise NotReady(f"{PROGRAM} ended: {_last_words(self.log)}")


@contextlib.contextmanager
def serving(config: ExportConfig) -> Iterator[Ganesha]:
    """An NFS server that exports what the configuration says while the block runs; it also ends with this process.

    Raises NotReady when the program is missing or does not start, PermissionDenied without root, AddressInUse,
    DeadlineExceeded.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise NotReady(f"there is no {PROGRAM} here: install it with {INSTALL}; or export with the kernel: --print")
    if os.geteuid() != 0:
        raise PermissionDenied(
            f"{PROGRAM} opens files by handle, which only root may: use sudo; or export with the kernel: --print"
        )
    _check_port(config)
    with tempfile.TemporaryDirectory(prefix="eldric-nfs-") as folder:
        state = Path(folder)
        settings, log = state / "ganesha.conf", state / "ganesha.log"
        settings.write_text(ganesha_configuration(config, state))
        process = subprocess.Popen(
            [program, "-F", "-f", str(settings), "-L", str(log), "-p", str(state / "pid")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for us, and we end it
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            _wait(process, config, log)
            yield Ganesha(process, log)
        finally:
            _stop(process)


def _check_port(config: ExportConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.address.port))
        except OSError as error:
            where = join_address(config.host, config.address.port)
            raise AddressInUse(f"cannot listen on {where}: {error.strerror}; choose another --port") from error


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: "subprocess.Popen[bytes]", config: ExportConfig, log: Path) -> None:
    """Until it answers on its port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    deadline = time.monotonic() + START_S
    while True:
        if process.poll() is not None:
            raise NotReady(f"{PROGRAM} did not start: {_last_words(log)}")
        with contextlib.suppress(OSError), socket.create_connection((host, config.address.port), timeout=1.0):
            return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{PROGRAM} does not listen after {START_S:.0f} s: {_last_words(log)}")
        time.sleep(_POLL_S)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(log: Path) -> str:
    """The newest line of a log that tells of something bad, without its date and names."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    bad = [line for line in lines if any(f":{level} :" in line for level in ("CRIT", "FATAL", "MAJ"))]
    return bad[-1].rpartition(" :")[2].strip() if bad else "its log says nothing"
