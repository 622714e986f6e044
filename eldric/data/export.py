"""Exporting a store's folder read-only over NFS 4: configuration for servers, and the word of it for the data worker.

Every client reads as the folder's owner, so that who may reach the port may read, and nobody needs an account here.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eldric.data.locks import NO_LOCKS
from eldric.errors import AlreadyExists, InvalidRequest, NotReady
from eldric.nfs.address import NFS_PORT, NfsAddress
from eldric.v1 import stage_pb2

#: Path that clients mount.
DEFAULT_PATH = "/models"

_MAX_RECORD_BYTES = 4096
_UNQUOTABLE = set('"\\\n\t,#()')


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What is exported, where the server listens, and who may read. Raises InvalidRequest."""

    folder: Path
    address: NfsAddress  # as clients reach it
    host: str = "127.0.0.1"  # to listen on
    clients: tuple[str, ...] = ()  # addresses or networks (CIDR); empty: everybody who reaches the port

    def __post_init__(self) -> None:
        if not self.folder.is_absolute() or set(str(self.folder)) & _UNQUOTABLE:
            raise InvalidRequest(
                f"{self.folder} cannot be exported: no quotes, commas, # or brackets in its path, please"
            )
        for client in self.clients:
            if not client.replace(".", "").replace(":", "").replace("/", "").replace("-", "").isalnum():
                raise InvalidRequest(f"{client!r} is no address or network of clients")

    @property
    def owner(self) -> tuple[int, int]:
        """User and group that clients read as. Raises NotReady when there is no such folder."""
        try:
            status = self.folder.stat()
        except OSError as error:
            raise NotReady(f"{self.folder} cannot be exported: {error.strerror}") from error
        return status.st_uid, status.st_gid


def ganesha_configuration(config: ExportConfig, state: Path) -> str:
    """For nfs-ganesha: version 4 alone, so that no rpcbind, D-Bus or Kerberos is needed. state: a folder of its own.

    https://github.com/nfs-ganesha/nfs-ganesha/tree/next/src/config_samples
    """
    user, group = config.owner
    listed = ", ".join(config.clients)
    access = (
        f"Access_Type = None;\n    CLIENT {{ Clients = {listed}; Access_Type = RO; }}"
        if listed
        else "Access_Type = RO;"
    )
    return f"""\
NFS_CORE_PARAM {{
    NFS_Port = {config.address.port};
    Bind_addr = {config.host};
    Protocols = 4;
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
}}
NFS_KRB5 {{ Active_krb5 = false; }}
NFSV4 {{ Graceless = true; RecoveryRoot = "{state}"; }}
EXPORT {{
    Export_Id = 1;
    Path = "{config.folder}";
    Pseudo = "{config.address.path}";
    Attr_Expiration_Time = 2;
    Squash = All;
    Anonymous_Uid = {user};
    Anonymous_Gid = {group};
    SecType = sys;
    Protocols = 4;
    {access}
    FSAL {{ Name = VFS; }}
}}
"""


def kernel_lines(config: ExportConfig) -> str:
    """For /etc/exports of the kernel's own server (exports(5)), with what to do beside."""
    user, group = config.owner
    options = f"ro,all_squash,anonuid={user},anongid={group},no_subtree_check,insecure"
    entries = " ".join(f"{client}({options})" for client in config.clients or ("*",))
    url = NfsAddress(config.address.host, str(config.folder), NFS_PORT)
    return (
        "# Into /etc/exports, then `exportfs -ra`. The data worker says where it is with\n"
        f"#   eldric-cli data ... --nfs {url}\n"
        f"{config.folder} {entries}\n"
    )


@contextlib.contextmanager
def announced(config: ExportConfig) -> Iterator[None]:
    """While the block runs, data workers of the folder tell everybody where it can be mounted from.

    The word is a file in the store, locked by this process: when it dies, it counts no more. Raises AlreadyExists when
    another process exports the folder, NotReady when the file cannot be written.
    """
    path = _record(config.folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise NotReady(f"{path} cannot be written: {error.strerror}") from error
    try:
        _lock(descriptor, path)
        address = config.address
        os.truncate(descriptor, 0)
        os.pwrite(
            descriptor, json.dumps({"host": address.host, "port": address.port, "path": address.path}).encode(), 0
        )
        try:
            yield
        finally:
            os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def exports_of(folder: Path, given: NfsAddress | None = None) -> list[stage_pb2.NfsExport]:
    """Where a store's folder can be mounted from now. given: what the operator said, for servers that are not ours."""
    found = given or _announced(folder)
    return [] if found is None else [stage_pb2.NfsExport(host=found.host, port=found.port, path=found.path)]


def _announced(folder: Path) -> NfsAddress | None:
    try:
        descriptor = os.open(_record(folder), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None  # nobody holds it: the one who wrote it is gone
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, InvalidRequest):
            told = json.loads(os.pread(descriptor, _MAX_RECORD_BYTES, 0))
            return NfsAddress(told["host"], told["path"], told["port"])
        return None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyExists(f"another process exports this folder already (it holds {path})") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise NotReady(f"{path} cannot be locked: {error.strerror}") from error


def _record(folder: Path) -> Path:
    return folder / ".eldric" / "export.json"
