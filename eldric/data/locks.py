"""Locks between processes that share a folder."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

#: What flock(2) says where a file system has no locks (some network mounts).
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@contextlib.contextmanager
def locked(path: Path, *, shared: bool) -> Iterator[None]:
    """Holds the lock `path` while the block runs; the kernel lets go of it when the process dies.

    shared: many may hold it at once, and whoever wants it waits; where there are no locks, goes on without. Otherwise
    this process alone holds it: raises OSError at once when somebody else does, or where there are no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not shared or error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
