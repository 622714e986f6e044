"""A store's folder is exported by a configuration of ours, and its data workers know while it is."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eldric.data import ganesha
from eldric.data.export import ExportConfig, announced, exports_of, ganesha_configuration, kernel_lines
from eldric.errors import AddressInUse, AlreadyExists, InvalidRequest, NotReady, PermissionDenied
from eldric.nfs.address import NfsAddress


def config_of(folder: Path, **changes: object) -> ExportConfig:
    settings = {"folder": folder, "address": NfsAddress("data.example", "/models", 12049), **changes}
    return ExportConfig(**settings)  # type: ignore[arg-type]


def test_the_server_listens_and_exports_read_only_as_the_folders_owner(tmp_path: Path) -> None:
    text = ganesha_configuration(config_of(tmp_path, host="10.0.0.7"), tmp_path / "state")
    for line in (
        "NFS_Port = 12049;",
        "Bind_addr = 10.0.0.7;",
        f'Path = "{tmp_path}";',
        'Pseudo = "/models";',
        "Access_Type = RO;",
        "Squash = All;",
        "Attr_Expiration_Time = 2;",
        f"Anonymous_Uid = {os.getuid()};",
    ):
        assert line in text
    assert "CLIENT" not in text


def test_only_named_clients_may_read(tmp_path: Path) -> None:
    config = config_of(tmp_path, clients=("10.0.0.0/8", "fd00::1"))
    text = ganesha_configuration(config, tmp_path)
    assert "Access_Type = None;" in text
    assert "CLIENT { Clients = 10.0.0.0/8, fd00::1; Access_Type = RO; }" in text
    assert f"{tmp_path} 10.0.0.0/8(ro,all_squash," in kernel_lines(config)


def test_the_kernels_lines_say_what_the_data_worker_is_to_be_told(tmp_path: Path) -> None:
    text = kernel_lines(config_of(tmp_path))
    assert f"--nfs nfs://data.example:2049{tmp_path}" in text
    last = text.splitlines()[-1]
    assert last.startswith(f"{tmp_path} *(ro,") and f"anonuid={os.getuid()}" in last


@pytest.mark.parametrize("folder", ['/a"b', "/a\nb", "relative", "/a#b"])
def test_a_folder_that_no_configuration_can_name_is_refused(folder: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be exported"):
        config_of(Path(folder))


@pytest.mark.parametrize("client", ["*", "a; Access_Type = RW", "", "10.0.0.0/8 }"])
def test_a_client_that_is_no_network_is_refused(tmp_path: Path, client: str) -> None:
    with pytest.raises(InvalidRequest, match="client"):
        config_of(tmp_path, clients=(client,))


def test_data_workers_know_of_an_export_while_it_is_there(tmp_path: Path) -> None:
    assert exports_of(tmp_path) == []
    with announced(config_of(tmp_path)):
        (export,) = exports_of(tmp_path)
        assert (export.host, export.port, export.path) == ("data.example", 12049, "/models")
        with pytest.raises(AlreadyExists, match="exports this folder already"), announced(config_of(tmp_path)):
            pass
        assert len(exports_of(tmp_path)) == 1
    assert exports_of(tmp_path) == []


def test_an_export_whose_process_was_killed_counts_no_more(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from eldric.data.export import ExportConfig, announced
from eldric.nfs.address import NfsAddress
with announced(ExportConfig(Path(sys.argv[1]), NfsAddress("h", "/m"))):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=30).returncode == 9
    assert (tmp_path / ".eldric" / "export.json").read_text()
    assert exports_of(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"host": "-x", "path": "/m", "port": 1}', '{"host": 1, "path": 2}'])
def test_a_record_that_makes_no_sense_is_passed_over(tmp_path: Path, text: str) -> None:
    with announced(config_of(tmp_path)):
        (tmp_path / ".eldric" / "export.json").write_text(text)
        assert exports_of(tmp_path) == []


def test_what_the_operator_says_goes_before(tmp_path: Path) -> None:
    (export,) = exports_of(tmp_path, NfsAddress("nas.example", "/volume1/models"))
    assert (export.host, export.port, export.path) == ("nas.example", 2049, "/volume1/models")


def test_a_server_that_is_not_installed_is_said_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotReady, match="apt-get install nfs-ganesha"), ganesha.serving(config_of(tmp_path)):
        pass


def fake_server(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / ganesha.PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def test_without_root_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path, "exit 0", monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionDenied, match="--print"), ganesha.serving(config_of(tmp_path)):
        pass


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "24/11/2026 : epoch 1 : vm : nfs-ganesha-1[main] load_fsal :FSAL :CRIT :Failed to load (libfsalvfs.so)"
    fake_server(tmp_path, f'while [ "$1" != -L ]; do shift; done; echo "{line}" > "$2"; exit 2', monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with (
        pytest.raises(NotReady, match="did not start: Failed to load"),
        ganesha.serving(config_of(tmp_path, host="127.0.0.1", address=NfsAddress("localhost", "/m", free_port()))),
    ):
        pass


def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path, "exit 0", monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = NfsAddress("localhost", "/m", taken.getsockname()[1])
        with pytest.raises(AddressInUse, match="--port"), ganesha.serving(config_of(tmp_path, address=address)):
            pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
