"""What gRPC says of a connection that could not be made, as people are told."""

import pytest

from eldric.unreachable import unreachable

_FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:9880: "
_TLS = f"{_FAILED}Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1: SSL routines:OPENSSL_internal:"
_CUSTOM = f"{_FAILED}Custom verification check failed with error: UNAUTHENTICATED: "
_DNS = "errors resolving no.invalid:9880: [field:hostname lookup error:address lookup failed for no.invalid:9880: "


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (f"{_FAILED}Failed to connect to remote host: Connection refused", "10.0.0.1:9880: Connection refused"),
        (f"{_DNS}Domain name not found]", "no.invalid:9880: Domain name not found"),
        (
            f"{_TLS}CERTIFICATE_VERIFY_FAILED: self signed certificate in certificate chain: OK",
            "10.0.0.1:9880: its certificate is another cluster's",
        ),
        (
            f"{_TLS}WRONG_VERSION_NUMBER: Invalid certificate verification context: OK",
            "10.0.0.1:9880: no TLS is spoken there: a node's gRPC port is its HTTP port + 1000",
        ),
        (
            f"{_FAILED}Cannot check peer: missing selected ALPN property.",
            "10.0.0.1:9880: no gRPC is spoken there: a node's gRPC port is its HTTP port + 1000",
        ),
        (f"{_CUSTOM}Hostname Verification Check failed.", "10.0.0.1:9880: another node is there"),
        ("Socket closed", "Socket closed"),
        (f"{_TLS}SOMETHING_NEW: odd: OK", "10.0.0.1:9880: odd"),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:[::1]:5: Connection refused",
            "[::1]:5: Connection refused",
        ),
    ],
)
def test_a_connection_that_could_not_be_made(details: str, words: str) -> None:
    assert unreachable(details, "the controller") == words


def test_an_address_is_said_once() -> None:
    assert unreachable(f"{_FAILED}Connection refused", "controller at 10.0.0.1:9880") == "Connection refused"
