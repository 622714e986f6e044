"""A cluster for a benchmark: the one that is named, or one made for the run and thrown away after it."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from eldric.client import Client


def eldric_cli(*arguments: str) -> None:
    """Run eldric-cli; raises CalledProcessError, with its complaint on stderr."""
    subprocess.run([sys.executable, "-m", "eldric.cli.main", *arguments], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def temporary_cluster(*, workers: int, options: Sequence[str] = ()) -> Iterator[Path]:
    """The folder of a running local cluster. options: more arguments of `eldric-cli up`."""
    with tempfile.TemporaryDirectory(prefix="eldric-bench-") as folder:
        eldric_cli("up", "--workers", str(workers), "--dir", folder, *options)
        try:
            yield Path(folder)
        finally:
            eldric_cli("down", "--dir", folder)


@contextlib.contextmanager
def deployed(folder: Path, file: Path, name: str, **options: object) -> Iterator[Client]:
    """A client of the cluster, with the model of `file` deployed as `name`; see Client.deploy for the options."""
    with Client(folder=folder) as client:
        if name not in {model.name for model in client.models.list()}:
            client.models.add(file, name)
        client.deploy(name, **options)
        try:
            yield client
        finally:
            client.undeploy(name)
