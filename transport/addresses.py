"""Addresses of transports: "scheme://host:port", IPv6 hosts in brackets."""

import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from eldric.transport.errors import InvalidAddress, ListenFailed


class HostPort(NamedTuple):
    host: str
    port: int


def join_address(scheme: str, host: str, port: int) -> str:
    """The address text. IPv6 hosts get their brackets here."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def split_address(address: str, scheme: str) -> HostPort:
    """Host (without brackets) and port. Raises InvalidAddress."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidAddress(f"{address!r} is no address: {error}") from error
    if (
        parts.scheme != scheme
        or not host
        or not port
        or parts.path
        or parts.query
        or parts.fragment
        or parts.username is not None
    ):
        raise InvalidAddress(f"{address!r} is no address of the form {scheme}://host:port")
    return HostPort(host, port)


def resolve_local(host: str) -> str:
    """The numeric address to listen on for a name or number of this machine. Raises ListenFailed."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ListenFailed(f"no address of this machine is called {host!r}: {error}") from error
