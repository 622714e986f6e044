"""The cluster that a command speaks to."""

import os
from pathlib import Path

from eldric.client import Client
from eldric.client.cluster import CLUSTER_FILE, find_cluster


def client_of(folder: Path | None, controller: str | None) -> Client:
    """A client for --dir, --controller, ELDRIC_DIR, ELDRIC_CONTROLLER, ./eldric-cluster or the context, in this order.

    Raises NotFound when none of them names a cluster.
    """
    named = folder or controller or os.environ.get("ELDRIC_DIR") or os.environ.get("ELDRIC_CONTROLLER")
    here = Path("eldric-cluster")
    if not named and (here / CLUSTER_FILE).exists():
        folder = here
    return Client(find_cluster(folder, controller, os.environ))
