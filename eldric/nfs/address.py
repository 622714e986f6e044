"""Where a folder is exported: nfs://HOST[:PORT]/PATH."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from eldric.errors import InvalidRequest
from eldric.names import join_address

NFS_PORT = 2049

#: A name or an address. It becomes an argument of other programs, so it looks like none of their options.
_HOST = re.compile(r"[A-Za-z0-9_\[:][A-Za-z0-9_.:%\]-]{0,254}")
_MAX_PATH = 1024


@dataclass(frozen=True, slots=True)
class NfsAddress:
    """An export as clients name it. Raises InvalidRequest for a part that cannot be one."""

    host: str
    path: str  # as a client mounts it, e.g. "/models"
    port: int = NFS_PORT

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise InvalidRequest(f"{self.host!r} is no host of an NFS server")
        if not 1 <= self.port <= 65535:
            raise InvalidRequest(f"{self.port} is no port of an NFS server")
        parts = self.path.split("/")
        clean = self.path.isprintable() and not set(self.path) & set(',"\\ ')
        if not self.path.startswith("/") or len(self.path) > _MAX_PATH or ".." in parts or not clean:
            raise InvalidRequest(f"{self.path!r} is no path of an NFS export: it is absolute, without blanks or commas")

    @classmethod
    def parse(cls, url: str) -> Self:
        """From nfs://HOST[:PORT]/PATH. Raises InvalidRequest."""
        parts = urlsplit(url)
        try:
            host, port = parts.hostname or "", parts.port or NFS_PORT
        except ValueError:
            raise InvalidRequest(f"{url!r} has no port of 1 to 65535") from None
        if parts.scheme != "nfs" or parts.query or parts.fragment or parts.username:
            raise InvalidRequest(f"{url!r} is not of the form nfs://HOST[:PORT]/PATH")
        return cls(host, unquote(parts.path) or "/", port)

    def __str__(self) -> str:
        return f"nfs://{join_address(self.host, self.port)}{quote(self.path)}"
