"""A wrong address, a missing certificate and a useless folder: each is said with what to do about it."""

from pathlib import Path

import pytest

from eldric.security import Authority
from tests.e2e.cli import Cli

pytestmark = pytest.mark.timeout(60)

NOBODY = "127.0.0.1:1"


@pytest.fixture
def stranger(tmp_path: Path) -> Cli:
    """Whose configuration is empty."""
    return Cli(tmp_path, {"XDG_CONFIG_HOME": str(tmp_path / "config")})


@pytest.fixture
def operator(tmp_path: Path, stranger: Cli) -> Cli:
    Authority.create("test").issue_identity("client", "me").save(tmp_path / "config" / "eldric" / "operator")
    return stranger


@pytest.mark.parametrize("command", [("status",), ("workers",), ("models", "ls"), ("deploy", "m"), ("run", "m", "hi")])
def test_a_wrong_address_is_named_and_so_is_the_command_that_looks(operator: Cli, command: tuple[str, ...]) -> None:
    error = operator(*command, "--controller", NOBODY, code=1).error
    assert f"({NOBODY}: Connection refused); `eldric-cli doctor --controller {NOBODY}` looks for the reason" in error


def test_doctor_says_how_a_controller_is_started(operator: Cli) -> None:
    checks = operator("doctor", "--controller", NOBODY, "--json", code=1).json["checks"]
    (found,) = [each for each in checks if each["check"] == "controller"]
    assert found["message"].count(NOBODY) == 1
    assert "`eldric-cli controller`" in found["advice"] and "`eldric-cli up`" in found["advice"]


def test_who_has_no_certificate_is_told_to_join(stranger: Cli) -> None:
    assert "`eldric-cli join TOKEN HOST:10880 --kind client`" in stranger("ps", "--controller", NOBODY, code=1).error
    checks = stranger("doctor", "--controller", NOBODY, "--json", code=1).json["checks"]
    (found,) = [each for each in checks if each["check"] == "operator"]
    assert "eldric-cli join" in found["advice"]
    assert not [each for each in checks if each["check"] == "controller"]


@pytest.mark.parametrize(
    ("folder", "why"),
    [("/proc/x", "No such file or directory"), ("/proc", "No such file"), ("/dev/null", "it is a file")],
)
def test_a_folder_that_cannot_hold_a_cluster(stranger: Cli, folder: str, why: str) -> None:
    error = stranger("up", "--dir", folder, code=1).error
    assert error.startswith(f"{folder} cannot hold a cluster: {why}")
    assert "--dir" in error


def test_a_node_without_a_certificate_is_told_to_join(stranger: Cli, tmp_path: Path) -> None:
    node = ("--folder", tmp_path / "w", "--controller", NOBODY)
    assert "join the cluster first (`eldric-cli join`" in stranger("router", *node, code=1).error
