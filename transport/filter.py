"""What a stage lets in: sound frames of its own pipeline and epoch, each once. Pure: it knows no socket or thread.

Whatever is dropped is counted by its reason; nothing that a peer sends raises.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from eldric.transport.codec import decode_frame, parse_header
from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import MAX_PAYLOAD_BYTES, PROTOCOL_VERSION, Frame
from eldric.v1 import frame_pb2


class DropReason(StrEnum):
    """Why a frame was not let in."""

    CORRUPT = "corrupt"  # its header or its parts are no frame's
    OVERSIZED = "oversized"  # its payload is over the limit
    UNKNOWN_PROTOCOL = "unknown_protocol"  # another protocol version
    UNKNOWN_PEER = "unknown_peer"  # its sender did not say hello, or is not allowed any more
    WRONG_PIPELINE = "wrong_pipeline"
    WRONG_STAGE = "wrong_stage"  # it names another sender than its link did
    STALE_EPOCH = "stale_epoch"
    EARLY_EPOCH = "early_epoch"  # a newer epoch, and as many as may wait do so already
    REPLAYED = "replayed"  # its serial was seen before


@dataclass(slots=True, eq=False)
class Sender:
    """A link's other end, as the filter knows it."""

    stage: int
    epoch: int = 0  # that its link was made or confirmed in
    serial: int = 0  # of the last frame that was looked at


class FrameFilter:
    """The door of one stage. Not thread-safe, but for `dropped`, which anybody may read.

    Frames of a newer epoch wait (at most `early_frames` with `early_bytes` of payload) until `set_epoch` names it,
    because stages learn of a new epoch one after the other, and the first ones send at once.
    """

    def __init__(
        self,
        pipeline_id: str,
        *,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        early_frames: int = 64,
        early_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self.pipeline_id = pipeline_id
        self.epoch = 0
        self.dropped: dict[str, int] = dict.fromkeys(map(str, DropReason), 0)
        self._max_payload_bytes = max_payload_bytes
        self._early_frames, self._early_bytes = early_frames, early_bytes
        self._early: deque[Frame] = deque()
        self._released: deque[Frame] = deque()

    def drop(self, reason: DropReason) -> None:
        self.dropped[reason] += 1

    def admit(self, header: bytes, payload: memoryview, sender: Sender) -> Frame | None:
        """The frame, or None when it was dropped or has to wait. sender: of the link that it came by."""
        if payload.nbytes > self._max_payload_bytes:
            self.drop(DropReason.OVERSIZED)
            return None
        try:
            message = parse_header(header)
            reason = self._sender_problem(message, sender)
            if reason is not None:
                self.drop(reason)
                return None
            frame = decode_frame(message, payload)
        except CorruptFrame:
            self.drop(DropReason.CORRUPT)
            return None
        sender.serial = message.serial
        if message.epoch != self.epoch:
            self._hold(frame)
            return None
        return frame

    def set_epoch(self, epoch: int) -> None:
        """Let in frames of `epoch` only. Those of that epoch that came early are given by `released`."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        waiting, self._early = [*self._released, *self._early], deque()
        self._released.clear()
        for frame in waiting:
            if frame.header.epoch == epoch:
                self._released.append(frame)
            else:
                self._hold(frame)

    def released(self) -> Frame | None:
        """The next frame that waited for this epoch."""
        return self._released.popleft() if self._released else None

    def _sender_problem(self, message: frame_pb2.FrameHeader, sender: Sender) -> DropReason | None:
        if message.protocol_version != PROTOCOL_VERSION:
            return DropReason.UNKNOWN_PROTOCOL
        if message.pipeline_id != self.pipeline_id:
            return DropReason.WRONG_PIPELINE
        if message.from_stage != sender.stage:
            return DropReason.WRONG_STAGE
        if message.serial <= sender.serial:
            return DropReason.REPLAYED
        return None

    def _hold(self, frame: Frame) -> None:
        if frame.header.epoch < self.epoch:
            self.drop(DropReason.STALE_EPOCH)
        elif (
            len(self._early) >= self._early_frames
            or sum(early.payload.nbytes for early in self._early) >= self._early_bytes
        ):
            self.drop(DropReason.EARLY_EPOCH)
        else:
            self._early.append(frame)
