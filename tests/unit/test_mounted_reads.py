"""Bytes come into the page cache through a process, whose every answer has a deadline."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from eldric.engine.errors import LoadCancelled, ModelUnreadable
from eldric.engine.shard import ByteRange
from eldric.errors import DeadlineExceeded
from eldric.worker.mounted import read_ahead
from eldric.worker.mounted.process import Child, Silent
from eldric.worker.mounted.read_ahead import ReadAhead

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.fixture
def probe() -> Iterator[Child]:
    child = Child("probe", {})
    yield child
    child.close()


def freeze(child: Child) -> None:
    child.greet()
    os.kill(child._process.pid, signal.SIGSTOP)


def test_ranges_are_there_when_they_were_asked_for_in_order(path: Path) -> None:
    ranges = [ByteRange(0, 5000, 3 * MIB), ByteRange(1, 100, MIB), ByteRange(1, 6 * MIB, 2 * MIB)]
    with ReadAhead([path, path], ranges, lambda: False) as reader:
        reader(0, 5000, 1000)
        reader(0, 6000, 3 * MIB - 1000)
        reader(1, 100, MIB)
        reader(1, 7 * MIB, MIB)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads no more than a piece ahead of what is used up."""
    monkeypatch.setattr(read_ahead, "WINDOW_BYTES", MIB)
    monkeypatch.setattr(read_ahead, "_STEP_BYTES", MIB)


@pytest.mark.usefixtures("narrow")
def test_reading_waits_for_what_is_used_up(path: Path) -> None:
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False) as reader:
        reader(0, 0, MIB)
        come = MIB
        with pytest.raises(Silent):
            while True:
                come = int(reader._child.line(0.5, lambda: False))
        assert come <= 2 * MIB  # nothing is used up: no more than a window, and a piece, comes
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False) as reader:
        for piece in range(8):
            reader(0, piece * MIB, MIB)


@pytest.mark.usefixtures("narrow")
def test_more_than_the_window_may_be_asked_for_at_once(path: Path) -> None:
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False) as reader:
        reader(0, MIB, 5 * MIB)
        reader(0, 6 * MIB, 2 * MIB)


def test_a_file_that_was_cut_is_an_error_that_says_where(path: Path) -> None:
    os.truncate(path, 3 * MIB)
    with (
        ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False) as reader,
        pytest.raises(ModelUnreadable, match=rf"after {3 * MIB} of {8 * MIB} bytes: the file was cut"),
    ):
        reader(0, 0, 8 * MIB)


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with (
        ReadAhead([tmp_path / "none"], [ByteRange(0, 0, 1)], lambda: False) as reader,
        pytest.raises(ModelUnreadable, match="No such file"),
    ):
        reader(0, 0, 1)


@pytest.mark.usefixtures("narrow")
def test_a_read_that_hangs_ends_with_its_deadline(path: Path) -> None:
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False, stall_s=0.3) as reader:
        freeze(reader._child)
        with pytest.raises(DeadlineExceeded, match=r"no byte of .* came for 0\.3 s, after \d+ of 8388608 bytes"):
            reader(0, 0, 8 * MIB)


@pytest.mark.usefixtures("narrow")
def test_a_read_that_hangs_can_be_cancelled(path: Path) -> None:
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: True) as reader:
        freeze(reader._child)
        with pytest.raises(LoadCancelled):
            reader(0, 0, 8 * MIB)


def test_a_killed_reader_is_an_error(path: Path) -> None:
    with ReadAhead([path], [ByteRange(0, 0, 8 * MIB)], lambda: False) as reader:
        reader._child._process.kill()
        with pytest.raises(ModelUnreadable, match="has ended"):
            reader(0, 0, 8 * MIB)
            reader(0, 8 * MIB - 1, 1)


def test_a_look_says_sizes_and_the_first_headers_sum(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * 10)
    child = Child("look", {"files": [[str(path), 5000], [str(other), 100]]})
    seen = json.loads(child.line(10))
    child.close()
    assert seen["sizes"] == [8 * MIB, 10]
    assert seen["sha256"] == hashlib.sha256(path.read_bytes()[:5000]).hexdigest()


def test_a_probe_answers_file_by_file_and_goes_on_after_a_failure(probe: Child, path: Path) -> None:
    stat = path.stat()
    seen = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    probe.say(str(path))
    assert json.loads(probe.line(10)) == seen
    probe.say(f"{path}-none")
    with pytest.raises(OSError, match="No such file"):
        probe.line(10)
    probe.say(str(path))
    assert json.loads(probe.line(10)) == seen


def test_a_silent_process_is_left_behind(probe: Child, path: Path) -> None:
    freeze(probe)
    probe.say(str(path))
    with pytest.raises(Silent):
        probe.line(0.2)
    assert not probe.ended
    probe.close()
    assert probe.ended
