"""Names and addresses of nodes."""

import ipaddress
import re
import socket

from eldric.errors import InvalidRequest

KINDS = ("controller", "worker", "data", "router", "edge")
#: Kinds of certificates: the nodes, and "client" for operators.
IDENTITY_KINDS = (*KINDS, "client")

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


def check_name(name: str) -> str:
    """A node's name: letters, digits, '-' and '.', at most 63 characters. Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{name!r} is no name for a node: use letters, digits, '-' and '.' (inside), at most 63 characters"
        )
    return name


def server_name(kind: str, name: str | None = None) -> str:
    """What a node's certificate calls it: "KIND.eldric", and "NAME.KIND.eldric" for this very one."""
    return f"{kind}.eldric" if name is None else f"{name}.{kind}.eldric"


def join_address(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port". Raises InvalidRequest."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise InvalidRequest(f"{address!r} is no address: write host:port")
    return host, int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_near(ip: str) -> bool:
    """Whether an IP address means another machine to everybody who uses it, or none: loopback, link-local (where clouds
    have services for their machines), unspecified, multicast."""
    address = ipaddress.ip_address(ip)
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast


def machine_address() -> str:
    """The address that this machine uses towards the default route, or its host name when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: picks a route, sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
