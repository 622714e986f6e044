"""Certificates that no running node renews: the operator's, and those of nodes that are down."""

import asyncio
import contextlib
import datetime
from pathlib import Path

from eldric.client import Cluster
from eldric.errors import EldricError, NotFound
from eldric.security import Authority, Identity, renew


def is_due(identity: Identity, now: datetime.datetime) -> bool:
    """Whether two thirds of its lifetime are over, as nodes count it too."""
    begin, end = identity.validity()
    return now >= begin + (end - begin) * 2 / 3


def reissue(authority: Authority, folder: Path, now: datetime.datetime) -> bool:
    """A new certificate for whose folder this is, if it is due. Returns whether it was."""
    try:
        identity = Identity.load(folder)
    except NotFound:
        return False
    if not is_due(identity, now):
        return False
    authority.issue_identity(identity.kind, identity.name).save(folder)
    return True


def keep_fresh(cluster: Cluster) -> None:
    """Renews the operator's certificate with the controller when it is due. What fails is tried again next time: when
    the certificate has ended, the calls that follow say so."""
    identity = cluster.identity()
    if is_due(identity, datetime.datetime.now(datetime.UTC)):
        with contextlib.suppress(EldricError, OSError):
            asyncio.run(renew(cluster.controllers[0], identity)).save(cluster.operator)
