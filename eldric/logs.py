"""Logging of a node process: lines of key=value pairs, to its log file and to stderr."""

from eldric.config import NodeConfig


def set_up(config: NodeConfig) -> None:
    """Sets up the root logger: `config.folder`/log and stderr, from `config.log_level` on. Called once per process."""
    raise NotImplementedError
