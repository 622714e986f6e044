"""Which transports there are, in which order, and how a third party adds one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eldric.transport import registry
from eldric.transport.errors import UnknownTransport
from eldric.transport.inproc import InprocTransport

CARRIER = """
from eldric.transport.inproc import InprocTransport

class PigeonTransport(InprocTransport):
    scheme = "pigeon"
"""


@pytest.fixture
def installed_pigeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution "pigeon-transport" as pip would have installed it, whose entry points name a transport."""
    (tmp_path / "pigeon_transport.py").write_text(CARRIER)
    info = tmp_path / "pigeon_transport-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon-transport\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[eldric.transports]\n"
        "pigeon = pigeon_transport:PigeonTransport\n"
        "zmq = pigeon_transport:PigeonTransport\n"
        "broken = pigeon_transport:Nothing\n"
        "wrong = pigeon_transport:InprocTransport.listen\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("pigeon_transport", None)


@pytest.mark.usefixtures("installed_pigeon")
def test_third_party_transport_is_found_offered_and_made() -> None:
    assert "pigeon" in registry.offers()
    assert "pigeon_transport" not in sys.modules  # offering imports nothing
    with registry.create("pigeon", "p", 0) as transport:
        assert transport.scheme == "pigeon" and transport.listen().startswith("pigeon://")


@pytest.mark.usefixtures("installed_pigeon")
def test_third_party_cannot_replace_a_transport_of_eldric() -> None:
    assert registry.load("zmq").__module__ == "eldric.transport.zmq"


@pytest.mark.usefixtures("installed_pigeon")
@pytest.mark.parametrize("scheme", ["broken", "wrong"])
def test_broken_third_party_transport_is_named(scheme: str) -> None:
    with pytest.raises(UnknownTransport, match=f"{scheme}.*pigeon_transport"):
        registry.load(scheme)


def test_unknown_scheme_names_what_is_installed() -> None:
    with pytest.raises(UnknownTransport, match=r"'smoke'.* only .*zmq"):
        registry.create("smoke", "p", 0)


def test_builtin_transports_are_installed() -> None:
    assert registry.load("inproc") is InprocTransport
    assert "zmq" in registry.offers()
    assert ("shm" in registry.offers()) == hasattr(os, "memfd_create")
    assert "inproc" not in registry.offers()  # of no use to another process


def test_the_best_comes_first_and_third_parties_before_the_relay() -> None:
    best_first = ("shm", "ucx", "zmq", "owl", "pigeon", "relay")
    assert registry.by_preference(["relay", "pigeon", "zmq", "owl", "ucx", "shm", "zmq"]) == best_first
