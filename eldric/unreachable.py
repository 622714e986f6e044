"""Why a connection could not be made, in the words of a person who gave a wrong address."""

import re

_ADDRESS = re.compile(r"(?:ipv[46]:|errors resolving )(\S+?): ")

#: What gRPC says, and what it means.
_MEANINGS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is another cluster's",
    "Hostname Verification Check failed": "another node is there",
    "missing selected ALPN property": "no gRPC is spoken there: a node's gRPC port is its HTTP port + 1000",
    "WRONG_VERSION_NUMBER": "no TLS is spoken there: a node's gRPC port is its HTTP port + 1000",
}


def unreachable(details: str, peer: str) -> str:
    """The address that was tried, unless `peer` names it, and what was wrong. details: gRPC's, of UNAVAILABLE."""
    said = next((meaning for mark, meaning in _MEANINGS.items() if mark in details), "")
    said = said or details.removesuffix(": OK").rpartition(": ")[2].rstrip("].")
    found = _ADDRESS.search(details)
    return f"{found[1]}: {said}" if found and found[1] not in peer else said
