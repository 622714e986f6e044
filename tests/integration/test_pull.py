"""Models from a hub: whole, resumed, and nothing lost."""

import hashlib
import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from eldric.data.importer import Importer
from eldric.data.puller import Puller, Resolved
from eldric.data.store import ModelStore
from eldric.errors import (
    AlreadyExists,
    EldricError,
    NotEnoughSpace,
    NotFound,
    NotReady,
    Unavailable,
)
from tests.hubs import FakeHub
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.pulling import (
    REPOSITORY,
    SIZE,
    URI,
    Pulling,
    Stopped,
    in_thread,
    is_whole,
    kept_bytes,
    partial,
)
from tests.stores import ignore

pytestmark = pytest.mark.usefixtures("calm")


def test_the_wanted_quantization_is_pulled_with_progress(store: ModelStore, pull: Callable[[], Pulling]) -> None:
    done = pull()()
    assert done.resolved == [Resolved(URI, "Tale-Q8_0", "Q8_0", (("Tale-Q8_0.gguf", SIZE),), 0)]
    assert done.phases == ["resolving", "downloading"]
    assert done.reports[-1] == ("downloading", SIZE, SIZE)
    assert store.get("Tale-Q8_0").files[0].sums.sha256 == hashlib.sha256(storyteller().read_bytes()).hexdigest()
    assert is_whole(store) and store.get("Tale-Q8_0").origin == URI


def test_the_hub_of_the_tests_is_one_for_the_official_client_too(hub: FakeHub, tmp_path: Path) -> None:
    info = huggingface_hub.HfApi(hub.url, token=False).model_info(REPOSITORY, files_metadata=True)
    sizes = {file.rfilename: file.lfs and file.lfs.size for file in info.siblings or ()}
    assert sizes["Tale-Q8_0.gguf"] == SIZE
    path = huggingface_hub.hf_hub_download(
        REPOSITORY, "Tale-Q8_0.gguf", endpoint=hub.url, local_dir=tmp_path / "hf", token=False
    )
    assert Path(path).read_bytes() == storyteller().read_bytes()


def test_a_split_set_comes_whole_and_under_the_names_of_the_store(
    store: ModelStore, hub: FakeHub, tmp_path: Path, pull: Callable[[], Pulling]
) -> None:
    write_small_llama(tmp_path / "big-Q4_0.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("big-*.gguf"))
    hub.add("owner/big", {f"Q4_0/{part.name}": part for part in reversed(parts)})
    assert len(pull()("hf://owner/big", "small:q4").resolved[0].files) == len(parts) > 1
    found = store.get("small:q4")
    assert [found.path(number).read_bytes() for number in range(len(parts))] == [part.read_bytes() for part in parts]
    assert is_whole(store, "small:q4")


def test_what_breaks_off_is_taken_up_where_it_was(store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]) -> None:
    hub.cut_at = [100_000, 100_001, 3_000_000]
    hub.statuses = [503, 429]
    pull()()
    assert [seen.range for seen in hub.downloads] == ["", "", "", "bytes=100000-", "bytes=100001-", "bytes=3000000-"]
    assert is_whole(store)


def test_a_pull_that_was_stopped_goes_on_when_it_is_asked_for_again(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    first = pull()
    first.stop_at = 2_000_000
    with pytest.raises(Stopped):
        first()
    assert store.list() == [] and 2_000_000 <= (kept := kept_bytes(store)) < SIZE
    again = Pulling(ModelStore(store.folder), hub)()
    assert again.resolved[0].kept_bytes == kept
    assert again.phases == ["resolving", "checking", "downloading"]
    assert hub.downloads[-1].range == f"bytes={kept}-"
    assert is_whole(store)


def test_parts_that_are_complete_are_not_read_again(
    store: ModelStore, hub: FakeHub, tmp_path: Path, pull: Callable[[], Pulling]
) -> None:
    write_small_llama(tmp_path / "big-Q4_0.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("big-*.gguf"))
    hub.add("owner/big", {part.name: part for part in parts})
    first = pull()
    first.stop_at = sum(part.stat().st_size for part in parts[:2])
    with pytest.raises(Stopped):
        first("hf://owner/big")
    before = len(hub.downloads)
    pull()("hf://owner/big")
    assert not {parts[0].name} & {seen.path.rpartition("/")[2] for seen in hub.downloads[before:]}
    assert is_whole(store, "big-Q4_0")


def test_another_version_of_the_file_is_not_mixed_with_what_is_kept(
    store: ModelStore, hub: FakeHub, tmp_path: Path, pull: Callable[[], Pulling]
) -> None:
    first = pull()
    first.stop_at = 1_000_000
    with pytest.raises(Stopped):
        first()
    hub.add(REPOSITORY, {"Tale-Q8_0.gguf": write_small_llama(tmp_path / "new.gguf", SmallLlama())})
    assert pull()().resolved[0].kept_bytes == 0
    assert store.get("Tale-Q8_0").path(0).read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_a_hub_without_ranges_starts_from_the_beginning(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    hub.ranges, hub.cut_at = False, [2_000_000]
    done = pull()()
    assert done.reports[-1] == ("downloading", SIZE, SIZE)
    assert is_whole(store)


def test_a_hub_that_goes_silent_is_an_error_that_says_how_to_go_on(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    hub.cut_at = [1_000_000] * 20
    with pytest.raises(Unavailable, match=r"Tale-Q8_0\.gguf does not come: .*ask again to go on"):
        pull()()
    assert kept_bytes(store) == 1_000_000
    hub.cut_at.clear()
    pull()()
    assert is_whole(store)


@pytest.mark.parametrize("silent", [False, True])
def test_a_pull_that_nobody_waits_for_ends_at_once_though_the_hub_stalls(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], silent: bool
) -> None:
    hub.stall_at, hub.silent = 1 << 20, silent
    first = pull()
    thread, failures = in_thread(first)
    assert hub.reached.wait(10)
    first.stop_at = 0
    first.hangup.end()
    thread.join(5)
    assert not thread.is_alive() and isinstance(failures[0], Unavailable if silent else Stopped)
    assert store.list() == [] and kept_bytes(store) <= 1 << 20


def test_a_name_in_use_is_refused_and_the_same_source_is_there_already(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    Importer(store).run(str(storyteller()), "tale", "copy", ignore)
    with pytest.raises(AlreadyExists, match="'tale'"):
        pull()(model="tale")
    pull()()
    before = len(hub.downloads)
    pull()()
    assert len(hub.downloads) == before
    store.get("Tale-Q8_0").path(0).unlink()
    with pytest.raises(AlreadyExists, match="remove it first"):
        pull()()


@pytest.mark.parametrize("first_is_stopped", [False, True])
def test_of_two_pulls_at_once_the_second_follows_and_takes_over(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], first_is_stopped: bool
) -> None:
    hub.stall_at = 1 << 20
    first = pull()
    second = Pulling(store, hub)
    second.puller = first.puller
    one, failed = in_thread(first)
    assert hub.reached.wait(10)
    other, failures = in_thread(second)
    while not any(phase == "downloading" for phase, _, _ in second.reports):
        assert other.is_alive()
    with pytest.raises(AlreadyExists, match="right now"):
        Importer(store).run(str(storyteller()), "Tale-Q8_0", "copy", ignore)
    if first_is_stopped:
        first.stop_at = 0
        first.hangup.end()
        one.join(10)
    hub.go_on.set()
    one.join(10)
    other.join(10)
    assert [type(error) for error in failed] == [Stopped] * first_is_stopped and failures == []
    assert len(hub.downloads) == 1 + first_is_stopped
    assert is_whole(store)


def test_of_two_data_workers_with_one_store_the_second_is_refused(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    hub.stall_at = 1 << 20
    first = pull()
    one, failed = in_thread(first)
    assert hub.reached.wait(10)
    with pytest.raises(AlreadyExists, match="by another data worker right now"):
        Pulling(ModelStore(store.folder), hub)()
    hub.go_on.set()
    one.join(10)
    assert failed == [] and is_whole(store)


def test_a_model_that_does_not_fit_is_refused_before_it_begins(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(NotEnoughSpace, match=f"needs {SIZE} bytes more.*{SIZE - 1000} are missing"):
        pull()()
    assert hub.downloads == []


def test_a_disk_that_fills_during_a_pull_loses_nothing(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(tmp_path / "store")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))  # a file that the disk does not take
    try:
        with pytest.raises(NotEnoughSpace, match="is full"):
            Pulling(store, hub)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept_bytes(store) == 2_000_000 and store.list() == []
    assert Pulling(store, hub)().resolved[0].kept_bytes == 2_000_000
    assert hub.downloads[-1].range == "bytes=2000000-"
    assert is_whole(store)


def test_a_pull_that_does_not_fit_after_all_is_kept_until_there_is_room(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "eldric-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        store = ModelStore(disk)
        with monkeypatch.context() as patch, pytest.raises(NotEnoughSpace, match="is full"):
            patch.setattr(Puller, "_check_space", lambda *args: None)  # it filled up after that
            Pulling(store, hub)()
        kept = kept_bytes(store)
        assert kept > 2_000_000 and store.list() == []
        with pytest.raises(NotEnoughSpace, match=f"needs {SIZE - kept} bytes more"):
            Pulling(store, hub)()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert Pulling(store, hub)().resolved[0].kept_bytes == kept
        assert is_whole(store)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_partial_file_that_became_a_link_is_not_written_through(
    store: ModelStore, hub: FakeHub, tmp_path: Path, pull: Callable[[], Pulling]
) -> None:
    first = pull()
    first.stop_at = 1_000_000
    with pytest.raises(Stopped):
        first()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    path = partial(store) / "Tale-Q8_0.gguf"
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(EldricError):
        pull()()
    assert victim.read_bytes() == b"mine" and store.list() == []


def test_what_is_being_pulled_is_not_removed(store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]) -> None:
    hub.stall_at = 1 << 20
    thread, failed = in_thread(pull())
    assert hub.reached.wait(10)
    with pytest.raises(NotReady, match="is being pulled right now"):
        store.remove("Tale-Q8_0")
    hub.go_on.set()
    thread.join(10)
    assert failed == [] and is_whole(store)


def test_a_folder_of_a_download_that_is_a_link_is_not_written_to(
    store: ModelStore, tmp_path: Path, pull: Callable[[], Pulling]
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    partial(store).parent.mkdir(parents=True)
    partial(store).symlink_to(victim)
    pull()()
    assert is_whole(store) and not list(victim.iterdir())


def test_removing_gives_up_what_is_kept(store: ModelStore, pull: Callable[[], Pulling]) -> None:
    first = pull()
    first.stop_at = 1_000_000
    with pytest.raises(Stopped):
        first()
    store.remove("Tale-Q8_0")
    assert not partial(store).exists()
    with pytest.raises(NotFound):
        store.remove("Tale-Q8_0")


def test_what_is_kept_survives_a_restart_and_goes_when_nobody_asks_for_long(
    store: ModelStore, pull: Callable[[], Pulling]
) -> None:
    first = pull()
    first.stop_at = 1_000_000
    with pytest.raises(Stopped):
        first()
    store.clean()
    assert kept_bytes(store) >= 1_000_000
    for path in (*partial(store).iterdir(), partial(store)):
        os.utime(path, (0, 0))
    store.clean()
    assert not partial(store).exists()


def test_a_plan_of_kept_files_that_makes_no_sense_starts_anew(
    store: ModelStore, hub: FakeHub, pull: Callable[[], Pulling]
) -> None:
    first = pull()
    first.stop_at = 1_000_000
    with pytest.raises(Stopped):
        first()
    (partial(store) / "pull.json").write_text(json.dumps({"x": 1}))
    (partial(store) / "folder").mkdir()
    pull()()
    assert hub.downloads[-1].range == "" and is_whole(store)
