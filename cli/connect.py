"""The cluster that a command speaks to."""

import os
import shlex
from pathlib import Path

from eldric.cli.certificates import keep_fresh
from eldric.client import Client, Cluster, find_cluster
from eldric.client.cluster import CLUSTER_FILE
from eldric.errors import NotReady
from eldric.node_file import is_running

HERE = Path("eldric-cluster")


def local_folder(folder: Path | None) -> Path:
    """Where the local cluster lies: what was asked for, ELDRIC_DIR, or ./eldric-cluster. Absolute."""
    return (folder or Path(os.environ.get("ELDRIC_DIR") or HERE)).expanduser().resolve()


def cluster_of(folder: Path | None, controller: str | None) -> Cluster:
    """The cluster of --dir, --controller, ELDRIC_DIR, ELDRIC_CONTROLLER, ./eldric-cluster or the context, in this
    order. Raises NotFound when none of them names one."""
    if folder is None and controller is not None:
        return find_cluster(None, controller, {})
    named = folder or os.environ.get("ELDRIC_DIR") or os.environ.get("ELDRIC_CONTROLLER")
    if not named and (HERE / CLUSTER_FILE).exists():
        folder = HERE
    return find_cluster(folder, None, os.environ)


def client_of(folder: Path | None, controller: str | None, *, timeout_s: float = 30.0) -> Client:
    """A client of that cluster. Raises NotReady for a local one that does not run."""
    cluster = cluster_of(folder, controller)
    if cluster.folder is not None and not is_running(cluster.folder / "controller"):
        there = shlex.quote(str(cluster.folder))
        raise NotReady(f"the cluster in {cluster.folder} does not run: start it with `eldric-cli up --dir {there}`")
    keep_fresh(cluster)
    return Client(cluster, timeout_s=timeout_s)
