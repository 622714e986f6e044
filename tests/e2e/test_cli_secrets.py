"""Who can read and write what the commands leave on a machine, and where secrets do not show."""

import contextlib
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eldric.security import JoinToken
from tests.e2e.cli import Cli

#: Names of files that are for their owner's eyes only.
KEYS = {"ca-key.pem", "node-key.pem"}


def modes(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in (folder, *folder.rglob("*")):
        yield path, stat.S_IMODE(path.lstat().st_mode)


@contextlib.contextmanager
def cluster(cli: Cli, folder: Path, umask: int) -> Iterator[None]:
    with cli.start("up", "--workers", 1, "--dir", folder, "--json", umask=umask) as process:
        said, _ = process.communicate(timeout=60)
    try:
        assert process.returncode == 0, said
        yield
    finally:
        cli("down", "--dir", folder)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_others_write_nothing_and_read_no_keys(home_cli: Cli, tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "cluster"
    with cluster(home_cli, folder, umask):
        found = dict(modes(folder))
        assert {path.name for path in found} > KEYS
        loose = {path: oct(mode) for path, mode in found.items() if mode & 0o022 and not path.is_symlink()}
        assert loose == {}
        assert {mode for path, mode in found.items() if path.name in KEYS} == {0o600}
        assert found[folder / "controller" / "authority"] == 0o700
        if umask == 0o077:
            assert {path: oct(mode) for path, mode in found.items() if mode & 0o077} == {}


def test_a_token_shows_in_no_command_line_log_or_file(home_cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    with cluster(home_cli, folder, 0o022):
        made = home_cli("token", "--dir", folder, "--json").json
        secret = made["token"].rpartition(".")[2]
        assert JoinToken.parse(made["token"]).format() == made["token"]
        joining = home_cli.start(
            *("join", "-", made["join_address"], "--folder", folder / "w9", "--name", "w9"), stdin=subprocess.PIPE
        )
        assert joining.stdin is not None
        assert secret not in " ".join(psutil.Process(joining.pid).cmdline())
        said, complaint = joining.communicate(made["token"] + "\n", timeout=60)
        assert joining.returncode == 0, complaint
        assert "worker w9 is a member" in said
        used_up = home_cli("join", "-", made["join_address"], "--folder", folder / "w10", code=1, text=made["token"])
        assert "used up" in used_up.error
        assert secret not in said + complaint + used_up.out + used_up.err
        keys = [line for path in folder.rglob("node-key.pem") for line in path.read_text().splitlines()[1:-1]]
        for path in (path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert secret.encode() not in content, path
            if path.name not in KEYS:
                assert not any(key.encode() in content for key in keys), path
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            assert "PRIVATE KEY" not in line
            assert secret not in line
