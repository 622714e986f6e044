"""Addresses of transports."""

import pytest

from eldric.transport.addresses import join_address, resolve_local, split_address
from eldric.transport.errors import InvalidAddress, ListenFailed


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1), ("node-7.lan", 65535), ("::1", 41000)])
def test_address_comes_back_as_it_was_joined(host: str, port: int) -> None:
    assert split_address(join_address("zmq", host, port), "zmq") == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "zmq", "zmq://", "zmq://host", "zmq://host:0", "zmq://:5", "zmq://host:65536", "zmq://host:x", "tcp://host:5",
     "zmq://host:5/path", "zmq://user@host:5", "zmq://[::1:5", "zmq://host:5?x=1", "zmq://host:5#x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidAddress):
        split_address(address, "zmq")


def test_host_of_another_machine_is_named() -> None:
    assert resolve_local("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ListenFailed, match="no-such-host"):
        resolve_local("no-such-host.invalid")
