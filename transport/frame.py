"""A frame: a small header (protos/eldric/v1/frame.proto) and a raw payload. Types and limits; codec.py codes them."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eldric.transport.errors import CorruptFrame
from eldric.v1 import frame_pb2

PROTOCOL_VERSION = 2
MAX_HEADER_BYTES = 16 * 1024
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024  # default; TransportOptions may say otherwise
MAX_PIPELINE_ID_BYTES = 64
MAX_INDEX = 4095  # of stages, lanes and slots
MAX_POSITION = 2**31 - 1
MAX_RUNS = 1024
MAX_DIMENSIONS = 4
MAX_TRACES = 64

Payload: TypeAlias = "bytes | bytearray | memoryview | NDArray[Any]"  # anything that is one contiguous piece of memory


class FrameKind(IntEnum):
    """What a frame carries; frame.proto says it in full."""

    HIDDEN = frame_pb2.FRAME_KIND_HIDDEN  # hidden states, stage to next stage
    TOKENS = frame_pb2.FRAME_KIND_TOKENS  # StepTokens, tail to head
    OPEN = frame_pb2.FRAME_KIND_OPEN  # SequenceOpen, head to tail
    CLOSE = frame_pb2.FRAME_KIND_CLOSE  # SequenceClose, head to tail
    PROBE = frame_pb2.FRAME_KIND_PROBE  # around the ring, back to its sender


class FrameDtype(IntEnum):
    """Element type of a payload, little-endian."""

    BYTES = frame_pb2.FRAME_DTYPE_BYTES  # a serialized message, or empty
    F32 = frame_pb2.FRAME_DTYPE_F32
    F16 = frame_pb2.FRAME_DTYPE_F16
    BF16 = frame_pb2.FRAME_DTYPE_BF16  # numpy has no such type: arrays of it are uint16
    I32 = frame_pb2.FRAME_DTYPE_I32


#: By FrameDtype. A list, because an enumeration's members are slow keys.
NUMPY_DTYPES = [np.dtype(name) for name in ("V1", "<f4", "<f2", "<u2", "<i4")]


class Run(NamedTuple):
    """Consecutive tokens of one sequence inside a step."""

    slot: int  # index of the sequence's KV slot, the same in every stage
    position: int  # absolute position of the run's first token
    count: int  # type: ignore[assignment]  # number of tokens, at least 1 (tuple.count is hidden on purpose)
    logits: bool  # whether the tail samples for the run's last token


class PositionRange(NamedTuple):
    """Absolute positions [start, end) of one slot."""

    slot: int
    start: int
    end: int


class StageTrace(NamedTuple):
    """When a stage had the step: nanoseconds of the clock that `clock` names."""

    stage: int
    clock: int
    received_ns: int
    began_ns: int
    computed_ns: int
    sent_ns: int


@dataclass(slots=True, kw_only=True)
class Header:
    """What a frame says about its payload. frame.proto describes each field.

    The last four name the sender. A received header has them; on a header to be sent they are ignored, because the
    link fills in its own: so a stage may pass on a header that it got.
    """

    kind: FrameKind
    step: int = 0
    lane: int = 0
    dtype: FrameDtype = FrameDtype.BYTES
    shape: tuple[int, ...] = ()
    runs: tuple[Run, ...] = ()
    replay: bool = False
    speculation_window: int = 0
    discard: PositionRange | None = None
    kv_cut: int | None = None
    trace: tuple[StageTrace, ...] = ()
    pipeline_id: str = ""
    epoch: int = 0
    from_stage: int = 0
    serial: int = 0

    @property
    def has_extras(self) -> bool:
        """Whether anything is set that most frames do without."""
        return bool(
            self.replay or self.speculation_window or self.trace or self.kv_cut is not None or self.discard is not None
        )


@dataclass(slots=True)
class Frame:
    """A received frame. The payload is valid as long as the frame or a view of it is held."""

    header: Header
    payload: memoryview

    def array(self) -> NDArray[Any]:
        """The payload as a read-only array of the header's shape and dtype, without a copy. BF16 comes as uint16.

        Raises CorruptFrame when the frame has no elements (FrameDtype.BYTES).
        """
        header = self.header
        if not header.shape:
            raise CorruptFrame(f"a {header.kind.name} frame has no array")
        return np.frombuffer(self.payload, NUMPY_DTYPES[header.dtype]).reshape(header.shape)
