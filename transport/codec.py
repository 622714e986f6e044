"""Headers to bytes and back.

Decoding makes views, never copies, of the payload. Everything that comes from a peer is checked here, but for who sent
it (filter.py): what passes has known kinds, numbers in range, and a payload of the length that its dimensions and
element type say. This runs for every token, so nothing is looked at twice.
"""

import math
from typing import NamedTuple

from google.protobuf.message import DecodeError

from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import (
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_INDEX,
    MAX_PIPELINE_ID_BYTES,
    MAX_POSITION,
    MAX_RUNS,
    MAX_TRACES,
    NUMPY_DTYPES,
    PROTOCOL_VERSION,
    Frame,
    FrameDtype,
    FrameKind,
    Header,
    PositionRange,
    Run,
    StageTrace,
)
from eldric.v1 import frame_pb2

_new_tuple = tuple.__new__  # Run(*row), without the Python call in between
_KINDS = {int(kind): kind for kind in FrameKind}
_DTYPES = {int(dtype): dtype for dtype in FrameDtype}
_HIDDEN, _BYTES = FrameKind.HIDDEN, FrameDtype.BYTES  # looking a member up costs more than the rest of a check


class _Runs(NamedTuple):
    """Runs that were checked."""

    runs: tuple[Run, ...]
    numbers: list[int]  # the same as they travel
    rows: int  # tokens of all


#: Those of the last frame that came: a stage passes most of them on as they are. Replaced whole, so by any thread.
_passing = _Runs((), [], 0)


def stamp(pipeline_id: str, epoch: int, from_stage: int) -> bytes:
    """The serialized fields that all frames of a link share; `encode_header` puts them in front.

    Serialized messages that follow one another parse as one merged message, so this saves building them each time
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins). Raises CorruptFrame for a value out of range.
    """
    _check_sender(pipeline_id, epoch, from_stage)
    return frame_pb2.FrameHeader(
        protocol_version=PROTOCOL_VERSION, pipeline_id=pipeline_id, epoch=epoch, from_stage=from_stage
    ).SerializeToString()


def encode_header(header: Header, stamped: bytes, serial: int, payload_bytes: int) -> bytes:
    """The header as it is sent. stamped: from `stamp`. Raises CorruptFrame for a frame that a peer would drop."""
    rows = 0
    try:
        message = frame_pb2.FrameHeader(
            step=header.step,
            serial=serial,
            kind=header.kind,  # type: ignore[arg-type]
            lane=header.lane,
            dtype=header.dtype,  # type: ignore[arg-type]
            shape=header.shape,
        )
        if header.runs:
            known = _passing
            if header.runs is not known.runs:
                known = _flatten(header.runs)
            rows = known.rows
            message.runs.extend(known.numbers)
        if header.has_extras:
            _encode_extras(header, message.extras)
    except (ValueError, TypeError) as error:  # a number that does not fit its field
        raise CorruptFrame(f"header: {error}") from error
    if header.lane > MAX_INDEX:
        raise CorruptFrame(f"lane {header.lane}, at most {MAX_INDEX}")
    _check_payload(header, payload_bytes, rows)
    data = stamped + message.SerializeToString()
    if len(data) > MAX_HEADER_BYTES:
        raise CorruptFrame(f"header of {len(data)} bytes, at most {MAX_HEADER_BYTES}")
    return data


def parse_header(data: bytes) -> frame_pb2.FrameHeader:
    """The header as it came, nothing but its encoding checked. Raises CorruptFrame."""
    if len(data) > MAX_HEADER_BYTES:
        raise CorruptFrame(f"header of {len(data)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        return frame_pb2.FrameHeader.FromString(data)
    except DecodeError as error:
        raise CorruptFrame("header is no FrameHeader message") from error


def decode_frame(message: frame_pb2.FrameHeader, payload: memoryview) -> Frame:
    """Check and convert what `parse_header` gave. Raises CorruptFrame: which field, and what is wrong with it."""
    kind = _KINDS.get(message.kind)
    if kind is None:
        raise CorruptFrame(f"unknown kind {message.kind}")
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise CorruptFrame(f"unknown dtype {message.dtype}")
    if message.lane > MAX_INDEX:
        raise CorruptFrame(f"lane {message.lane}, at most {MAX_INDEX}")
    header = Header(
        kind=kind,
        step=message.step,
        lane=message.lane,
        dtype=dtype,
        shape=tuple(message.shape[:]),
        pipeline_id=message.pipeline_id,
        epoch=message.epoch,
        from_stage=message.from_stage,
        serial=message.serial,
    )
    rows = 0
    numbers = message.runs[:]
    if numbers:
        global _passing
        _passing = known = _parse_runs(numbers)
        header.runs, rows = known.runs, known.rows
    if message.HasField("extras"):
        _decode_extras(message.extras, header)
    _check_payload(header, payload.nbytes, rows)
    return Frame(header, payload)


def _encode_extras(header: Header, extras: frame_pb2.FrameExtras) -> None:
    extras.replay = header.replay
    extras.speculation_window = header.speculation_window
    if header.discard is not None:
        slot, start, end = header.discard
        extras.discard.CopyFrom(frame_pb2.PositionRange(slot=slot, start=start, end=end))
    if header.kv_cut is not None:
        extras.kv_cut = header.kv_cut
    for t in header.trace:
        extras.trace.add(
            stage=t.stage,
            clock=t.clock,
            received_ns=t.received_ns,
            began_ns=t.began_ns,
            computed_ns=t.computed_ns,
            sent_ns=t.sent_ns,
        )
    _check_extras(header)


def _decode_extras(extras: frame_pb2.FrameExtras, header: Header) -> None:
    header.replay = extras.replay
    header.speculation_window = extras.speculation_window
    if extras.HasField("discard"):
        discard = extras.discard
        header.discard = PositionRange(discard.slot, discard.start, discard.end)
    if extras.HasField("kv_cut"):
        header.kv_cut = extras.kv_cut
    header.trace = tuple(
        [StageTrace(t.stage, t.clock, t.received_ns, t.began_ns, t.computed_ns, t.sent_ns) for t in extras.trace]
    )
    _check_extras(header)


def _parse_runs(numbers: list[int]) -> _Runs:
    """numbers: slot, position, count and logits of each run, one after the other; at least one."""
    if len(numbers) % 4 or len(numbers) > 4 * MAX_RUNS:
        raise CorruptFrame(f"{len(numbers)} numbers of runs, not 4 for each of at most {MAX_RUNS}")
    runs = []
    rows = 0
    each = iter(numbers)
    for slot, position, count, logits in zip(each, each, each, each, strict=True):
        if slot > MAX_INDEX or logits > 1 or count < 1 or position + count > MAX_POSITION:
            raise _bad_run(slot, position, count, logits)
        rows += count
        runs.append(_new_tuple(Run, (slot, position, count, logits == 1)))
    return _Runs(tuple(runs), numbers, rows)


def _flatten(runs: tuple[Run, ...]) -> _Runs:
    """The reverse, with the same checks."""
    if len(runs) > MAX_RUNS:
        raise CorruptFrame(f"{4 * len(runs)} numbers of runs, at most 4 for each of {MAX_RUNS}")
    numbers: list[int] = []
    rows = 0
    for slot, position, count, logits in runs:
        if slot > MAX_INDEX or logits > 1 or count < 1 or position + count > MAX_POSITION:
            raise _bad_run(slot, position, count, logits)
        rows += count
        numbers += (slot, position, count, +logits)  # `+`: the field takes no bool
    return _Runs(runs, numbers, rows)


def _bad_run(slot: int, position: int, count: int, logits: int) -> CorruptFrame:
    return CorruptFrame(
        f"a run's slot is {slot}, its logits {logits}; or runs of {count} tokens up to position {position}"
    )


def _check_extras(header: Header) -> None:
    if len(header.trace) > MAX_TRACES:
        raise CorruptFrame(f"{len(header.trace)} stage traces, at most {MAX_TRACES}")
    if header.discard is not None and not header.discard.start < header.discard.end <= MAX_POSITION:
        raise CorruptFrame(f"discard range [{header.discard.start}, {header.discard.end}) is empty or out of range")


def _check_sender(pipeline_id: str, epoch: int, from_stage: int) -> None:
    if not 0 < len(pipeline_id.encode()) <= MAX_PIPELINE_ID_BYTES:
        raise CorruptFrame(f"pipeline id of {len(pipeline_id.encode())} bytes, not 1 to {MAX_PIPELINE_ID_BYTES}")
    if not 0 < epoch < 2**64:
        raise CorruptFrame(f"epoch {epoch} is out of range")
    if not 0 <= from_stage <= MAX_INDEX:
        raise CorruptFrame(f"stage {from_stage} is out of range")


def _check_payload(header: Header, payload_bytes: int, rows: int) -> None:
    shape = header.shape
    if header.dtype is _BYTES:
        if shape:
            raise CorruptFrame(f"shape {shape} of a payload without elements")
        if header.kind is _HIDDEN:
            raise CorruptFrame("a HIDDEN frame without elements")
        return
    if not 0 < len(shape) <= MAX_DIMENSIONS:
        raise CorruptFrame(f"{len(shape)} dimensions, not 1 to {MAX_DIMENSIONS}")
    expected = math.prod(shape) * NUMPY_DTYPES[header.dtype].itemsize
    if expected != payload_bytes or min(shape) < 1:
        raise CorruptFrame(f"shape {shape} of {header.dtype.name} is {expected} bytes, the payload {payload_bytes}")
    if header.kind is _HIDDEN and (len(shape) != 2 or shape[0] != rows):
        raise CorruptFrame(f"hidden states of shape {shape} do not match the rows of {len(header.runs)} runs")
