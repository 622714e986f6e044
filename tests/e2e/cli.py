"""eldric-cli as a process of its own, and clusters that it starts."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from eldric.cli import main, processes
from eldric.cli.local import LocalCluster

#: Longest wait for a command.
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What --json printed: one object on one line."""
        assert self.out.count("\n") == 1, self
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of complaint of a command that failed."""
        assert self.code == 1, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self
        assert self.err.endswith(f"{lines[0]}\n"), self
        assert "Traceback" not in self.err, self
        return lines[0].removeprefix("error: ")


@dataclass(frozen=True, slots=True)
class Cli:
    """Runs commands for one cluster, with a home of its own: no context, no caches."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    inside: bool = False  # in this process, which is ten times as quick

    @property
    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ELDRIC_", "XDG_"))}
        return {**kept, "HOME": str(self.home), **self.environment}

    def __call__(self, *arguments: object, code: int | None = 0, text: str | None = None) -> Done:
        """Run to the end. `code`: the exit code that is expected, None for any; `text`: stdin."""
        ended = self._inside(arguments, text) if self.inside else self._outside(arguments, text)
        assert code is None or ended.code == code, ended
        return ended

    def _inside(self, arguments: Sequence[object], text: str | None) -> Done:
        out, err = io.StringIO(), io.StringIO()
        here = os.getcwd()
        with (
            mock.patch.dict(os.environ, self._environment, clear=True),
            mock.patch.object(sys, "stdin", io.StringIO(text or "")),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            os.chdir(self.home)
            try:
                code = main.run([str(each) for each in arguments])
            finally:
                os.chdir(here)
        return Done(code, out.getvalue(), err.getvalue())

    def _outside(self, arguments: Sequence[object], text: str | None) -> Done:
        done = subprocess.run(
            self._command(*arguments),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=self._environment,
            cwd=self.home,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: object, **settings: Any) -> "subprocess.Popen[str]":
        """Start, with pipes for stdout and stderr unless it is said otherwise."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        return subprocess.Popen(
            self._command(*arguments), text=True, env=self._environment, cwd=self.home, start_new_session=True, **pipes
        )

    def _command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "eldric.cli.main", *map(str, arguments)]


def interrupt(process: "subprocess.Popen[str]", number: int = signal.SIGINT) -> Done:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return Done(process.returncode, out, err)


def running(folder: Path) -> dict[Path, int]:
    """Processes of the nodes of a cluster."""
    with contextlib.suppress(Exception):
        cluster = LocalCluster.load(folder)
        return processes.find(map(cluster.node_folder, cluster.nodes))
    return processes.find([folder / name for name in ("controller", "data", "router", "worker-1", "worker-2")])


@contextlib.contextmanager
def ending(folder: Path) -> Iterator[None]:
    """Whatever a test does, its nodes do not outlive it."""
    try:
        yield
    finally:
        processes.end(running(folder))


def wait_for(condition: Any, seconds: float = 20.0) -> Any:
    """Wait for what another process does; the condition's value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value
