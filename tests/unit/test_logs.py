"""Logging of a node process."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from eldric import logs
from eldric.config import NodeConfig
from eldric.errors import InvalidRequest


@pytest.fixture(autouse=True)
def root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_lines_go_to_the_file_and_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(NodeConfig("controller", "c1", tmp_path / "new"))
    logging.getLogger("eldric.part").info("event=%s", "started")
    logging.getLogger("eldric.part").debug("event=unseen")
    line = (tmp_path / "new" / "log").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=INFO node=controller/c1 logger=eldric\.part event=started\n",
        line,
    )
    assert capsys.readouterr().err == line


def test_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'LOUD' is no log level"):
        logs.set_up(NodeConfig("controller", "c1", tmp_path, log_level="LOUD"))


def test_levels_are_read_in_lower_case(tmp_path: Path) -> None:
    logs.set_up(NodeConfig("controller", "c1", tmp_path, log_level="debug"))
    assert logging.getLogger().level == logging.DEBUG
    assert logging.getLogger("uvicorn").level == logging.WARNING


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_that_cannot_be_written_says_so_once_and_goes_on_when_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    logs.set_up(NodeConfig("controller", "c1", tmp_path), stderr=False)
    for _ in range(3):
        logging.getLogger("eldric.part").info("event=lost")
    assert capsys.readouterr().err == f"the log {path} cannot be written: No space left on device\n"
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]
    (stream,) = (each.stream for each in handlers if each.baseFilename == str(path))
    assert stream is not None
    with (tmp_path / "room").open("wb") as room:
        os.dup2(room.fileno(), stream.fileno())
    logging.getLogger("eldric.part").info("event=kept")
    assert (tmp_path / "room").read_text().endswith(" event=kept\n")
    assert capsys.readouterr().err == ""
