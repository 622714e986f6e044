"""Which mount a path lies on, and where an export is mounted, from /proc/self/mountinfo alone."""

from pathlib import Path

import pytest

from eldric.errors import InvalidRequest
from eldric.nfs.address import NfsAddress
from eldric.nfs.mountinfo import folders_of, mounts, remote_mount

LINES = r"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard
23 22 0:21 / /proc rw,nosuid shared:12 - proc proc rw
40 22 0:44 / /mnt/store ro,noatime shared:30 - nfs4 10.0.0.7:/models ro,vers=4.1,port=12049,addr=10.0.0.7
41 22 0:45 /sub /mnt/part ro - nfs4 files.example:/ ro,vers=4.2,addr=10.0.0.8
42 22 0:46 / /mnt/a\040b ro - fuse.eldric-nfs nfs://127.0.0.1:12049/models ro,user_id=0
43 40 254:1 /x /mnt/store/local rw - ext4 /dev/vda1 rw
a line that is none
"""
MOUNTS = mounts(LINES)


def test_fields_are_read_and_lines_that_are_none_passed_over() -> None:
    store = next(mount for mount in MOUNTS if mount.point == "/mnt/store")
    assert (len(MOUNTS), store.kind, store.source, store.option("port")) == (6, "nfs4", "10.0.0.7:/models", "12049")
    assert [mount.point for mount in MOUNTS if mount.is_remote] == ["/mnt/store", "/mnt/part", "/mnt/a b"]


@pytest.mark.parametrize(
    ("path", "point"),
    [
        ("/mnt/store/m/m.gguf", "/mnt/store"),
        ("/mnt/store", "/mnt/store"),
        ("/mnt/./part//x", "/mnt/part"),
        ("/mnt/a b/c", "/mnt/a b"),
        ("/mnt/storey/m.gguf", None),
        ("/mnt", None),
        ("/srv/models", None),
    ],
)
def test_a_path_lies_on_the_innermost_mount_that_may_hang(path: str, point: str | None) -> None:
    found = remote_mount(Path(path), MOUNTS)
    assert (found and found.point) == point


def test_links_are_followed_up_to_a_mount_that_may_hang_and_not_beyond(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/mnt/store/deep")
    (tmp_path / "relative").symlink_to("link/../models")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link/m.gguf", "relative"):
        found = remote_mount(tmp_path / name, MOUNTS)
        assert found is not None and found.point == "/mnt/store"
    assert remote_mount(tmp_path / "loop" / "m.gguf", MOUNTS) is None


@pytest.mark.parametrize(
    ("path", "point"),
    [("/usr/models", "/"), ("/data/models", None), ("/data/nfs/m.gguf", "/data/nfs"), ("/", "/"), ("/data", None)],
)
def test_what_is_mounted_within_a_remote_root_counts_by_itself(path: str, point: str | None) -> None:
    lines = r"""22 1 0:20 / / ro - nfs4 10.0.0.1:/root ro
23 22 8:1 / /data rw - ext4 /dev/sda1 rw
24 23 0:21 / /data/nfs ro - nfs4 10.0.0.2:/models ro
"""
    found = remote_mount(Path(path), mounts(lines))
    assert (found and found.point) == point


@pytest.mark.parametrize(
    ("url", "folders"),
    [
        ("nfs://10.0.0.7:12049/models", ["/mnt/store"]),
        ("nfs://10.0.0.7:12049/models/deep", ["/mnt/store/deep"]),
        ("nfs://10.0.0.7/models", []),  # another port
        ("nfs://10.0.0.9:12049/models", []),
        ("nfs://files.example/sub/models", ["/mnt/part/models"]),
        ("nfs://files.example/other", []),
        ("nfs://127.0.0.1:12049/models", ["/mnt/a b"]),
    ],
)
def test_an_export_is_found_where_it_or_what_contains_it_is_mounted(url: str, folders: list[str]) -> None:
    assert [str(folder) for folder in folders_of(NfsAddress.parse(url), MOUNTS)] == folders


def test_addresses_are_read_and_written() -> None:
    for url in ("nfs://data.example:2049/models", "nfs://[fd00::1]:12049/a%20b".replace("%20", "-")):
        assert str(NfsAddress.parse(url)) == url
    assert NfsAddress.parse("nfs://host/x") == NfsAddress("host", "/x", 2049)


@pytest.mark.parametrize(
    "url",
    [
        "http://host/x",
        "nfs:///x",
        "nfs://-oProxyCommand=x/y",
        "nfs://host:0x/y",
        "nfs://host:99999/y",
        "nfs://user@host/y",
        "nfs://host/a/../b",
        "nfs://host/a,rw",
        "nfs://host/a b",
        'nfs://host/a"b',
        "nfs://host/x?version=3",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        NfsAddress.parse(url)
