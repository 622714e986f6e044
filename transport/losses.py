"""Lost peers that `recv` has still to report, each in the epoch that its link belonged to."""

from collections import deque
from typing import Protocol

from eldric.transport.errors import PeerLost


class LinkEnd(Protocol):
    """What knows the epoch of a link; it may still change after the link's end was noticed."""

    epoch: int


class Losses:
    """`add` may be called from any thread, all else by the transport's."""

    def __init__(self) -> None:
        self._epoch = 0
        self._new: deque[tuple[PeerLost, LinkEnd]] = deque()
        self._later: list[tuple[PeerLost, LinkEnd]] = []  # lost to an epoch that is still to come here

    def add(self, lost: PeerLost, link: LinkEnd) -> None:
        self._new.append((lost, link))

    def __bool__(self) -> bool:
        """Whether `take` may have something."""
        return bool(self._new)

    def take(self) -> PeerLost | None:
        """The next loss of this epoch. Those of older epochs are of no interest any more."""
        while self._new:
            lost, link = self._new.popleft()
            if link.epoch == self._epoch:
                return lost
            if link.epoch > self._epoch:
                self._later.append((lost, link))
        return None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._new.extend(self._later)
        self._later.clear()
