"""Back-pressure of one link: the two ends of the window that bounds what is under way. Pure."""

from dataclasses import dataclass

from eldric.v1 import frame_pb2

FIRST_WINDOW_FRAMES = 8
FIRST_WINDOW_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class SendWindow:
    """The sender's end: what it sent, and what the receiver is known to have taken."""

    sent_frames: int = 0
    sent_bytes: int = 0
    taken_frames: int = 0
    taken_bytes: int = 0
    window_frames: int = FIRST_WINDOW_FRAMES
    window_bytes: int = FIRST_WINDOW_BYTES

    @property
    def open(self) -> bool:
        """Whether one more frame may be sent, of any size."""
        return (
            self.sent_frames - self.taken_frames < self.window_frames
            and self.sent_bytes - self.taken_bytes < self.window_bytes
        )

    @property
    def frames_under_way(self) -> int:
        return self.sent_frames - self.taken_frames

    def sent(self, payload_bytes: int) -> None:
        self.sent_frames += 1
        self.sent_bytes += payload_bytes

    def granted(self, grant: frame_pb2.LinkGrant) -> None:
        """The receiver took more. A grant that claims more than was sent, or less than before, changes nothing."""
        if self.taken_frames <= grant.taken_frames <= self.sent_frames:
            self.taken_frames = grant.taken_frames
            self.taken_bytes = min(grant.taken_bytes, self.sent_bytes)
            self.window_frames, self.window_bytes = grant.window_frames, grant.window_bytes


@dataclass(slots=True)
class ReceiveWindow:
    """The receiver's end: counts what was taken, and says when the sender is to be told."""

    window_frames: int
    window_bytes: int
    taken_frames: int = 0
    taken_bytes: int = 0
    _told_frames: int = 0
    _told_bytes: int = 0

    def taken(self, payload_bytes: int) -> bool:
        """Whether it is time for a grant: when a quarter of the window was taken since the last one."""
        self.taken_frames += 1
        self.taken_bytes += payload_bytes
        return (
            4 * (self.taken_frames - self._told_frames) >= self.window_frames
            or 4 * (self.taken_bytes - self._told_bytes) >= self.window_bytes
        )

    @property
    def is_told(self) -> bool:
        """Whether the sender was told of everything that was taken."""
        return self._told_frames == self.taken_frames

    def grant(self) -> bytes:
        """The serialized LinkGrant to send now."""
        self._told_frames, self._told_bytes = self.taken_frames, self.taken_bytes
        return frame_pb2.LinkGrant(
            taken_frames=self.taken_frames,
            taken_bytes=self.taken_bytes,
            window_frames=self.window_frames,
            window_bytes=self.window_bytes,
        ).SerializeToString()
