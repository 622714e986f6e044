"""Logging of a node process: lines of key=value pairs, to its log file and to stderr."""

import contextlib
import logging
import logging.handlers
import sys
import time

from eldric.config import NodeConfig
from eldric.errors import InvalidRequest

#: A log file is kept up to this size, in bytes, and this many older ones beside it.
MAX_BYTES = 16 * 1024 * 1024
OLDER_FILES = 2


class _Formatter(logging.Formatter):
    """ "TIME level=L node=KIND/NAME logger=L EVENT", where EVENT is the message: key=value pairs."""

    converter = staticmethod(time.gmtime)

    def __init__(self, node_id: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03dZ level=%(levelname)s node={node_id} logger=%(name)s %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )


class _LogFile(logging.handlers.RotatingFileHandler):
    """A file that, while it cannot be written, says so once, on stderr. What is logged meanwhile is lost."""

    _problem = ""

    def emit(self, record: logging.LogRecord) -> None:
        before, self._problem = self._problem, ""
        super().emit(record)
        if self._problem and not before:
            with contextlib.suppress(OSError, ValueError):
                print(f"the log {self.baseFilename} cannot be written: {self._problem}", file=sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            self._problem = error.strerror or str(error)
        else:
            super().handleError(record)


def set_up(config: NodeConfig, *, stderr: bool = True) -> None:
    """Sets up the root logger: `config.folder`/log and, if wanted, stderr, from `config.log_level` on. Called once per
    process.

    Raises InvalidRequest for an unknown level.
    """
    level = logging.getLevelNamesMapping().get(config.log_level.upper())
    if level is None:
        raise InvalidRequest(f"{config.log_level!r} is no log level; levels are DEBUG, INFO, WARNING, ERROR")
    config.folder.mkdir(parents=True, exist_ok=True)
    file = _LogFile(config.folder / "log", maxBytes=MAX_BYTES, backupCount=OLDER_FILES, encoding="utf-8")
    root = logging.getLogger()
    handlers: list[logging.Handler] = [file, logging.StreamHandler(sys.stderr)] if stderr else [file]
    for handler in handlers:
        handler.setFormatter(_Formatter(config.node_id))
        root.addHandler(handler)
    root.setLevel(level)
    for chatty in ("uvicorn", "asyncio"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
