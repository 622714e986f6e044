"""The cluster that a command speaks to."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from eldric.cli.certificates import keep_fresh
from eldric.client import Client, Cluster, find_cluster
from eldric.client.cluster import CLUSTER_FILE
from eldric.errors import NotFound, NotReady, Unavailable
from eldric.node_file import is_running

HERE = Path("eldric-cluster")
#: How the message of a client begins that reaches no controller.
NO_CONTROLLER = ("the controller cannot be reached", "no controller answers")


def local_folder(folder: Path | None) -> Path:
    """Where the local cluster lies: what was asked for, ELDRIC_DIR, or ./eldric-cluster. Absolute."""
    return (folder or Path(os.environ.get("ELDRIC_DIR") or HERE)).expanduser().resolve()


def cluster_of(folder: Path | None, controller: str | None) -> Cluster:
    """The cluster of --dir, --controller, ELDRIC_DIR, ELDRIC_CONTROLLER, ./eldric-cluster or the context, in this
    order. Raises NotFound when none of them names one."""
    if folder is None and controller is not None:
        return find_cluster(None, controller, {})
    if folder is not None or os.environ.get("ELDRIC_DIR"):
        return find_cluster(local_folder(folder))
    if not os.environ.get("ELDRIC_CONTROLLER") and (HERE / CLUSTER_FILE).exists():
        return find_cluster(local_folder(None))
    return find_cluster(None, None, os.environ)


@contextlib.contextmanager
def client_of(folder: Path | None, controller: str | None, *, timeout_s: float = 30.0) -> Iterator[Client]:
    """A client of that cluster. Raises NotReady for a local one that does not run, NotFound without an operator's
    certificate."""
    cluster = cluster_of(folder, controller)
    if cluster.folder is not None and not is_running(cluster.folder / "controller"):
        there = shlex.quote(str(cluster.folder))
        raise NotReady(f"the cluster in {cluster.folder} does not run: start it with `eldric-cli up --dir {there}`")
    check_operator(cluster)
    keep_fresh(cluster)
    with Client(cluster, timeout_s=timeout_s) as client:
        try:
            yield client
        except Unavailable as error:
            if not error.message.startswith(NO_CONTROLLER):
                raise
            doctor = f"eldric-cli doctor{_named(folder, controller)}"
            raise Unavailable(f"{error.message}; `{doctor}` looks for the reason") from error


def check_operator(cluster: Cluster) -> None:
    """Raises NotFound without an operator's certificate, and says how to get one."""
    try:
        cluster.identity()
    except NotFound:
        raise NotFound(
            f"no operator's certificate is in {cluster.operator}, to show to the controller: `eldric-cli join TOKEN "
            "HOST:10880 --kind client` gets one; an operator makes the token: `eldric-cli token --kind client`"
        ) from None


def _named(folder: Path | None, controller: str | None) -> str:
    """How the cluster was named."""
    if folder is not None:
        return f" --dir {shlex.quote(str(folder))}"
    return "" if controller is None else f" --controller {shlex.quote(controller)}"
