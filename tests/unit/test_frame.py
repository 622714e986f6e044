"""Headers there and back, their limits, and what hostile bytes do: nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldric.transport.codec import decode_frame, encode_header, parse_header, stamp
from eldric.transport.errors import CorruptFrame
from eldric.transport.frame import (
    MAX_HEADER_BYTES,
    MAX_RUNS,
    Frame,
    FrameDtype,
    FrameKind,
    Header,
    PositionRange,
    Run,
    StageTrace,
)
from eldric.v1 import frame_pb2

STAMP = stamp("pipeline-1", 3, 1)


def there_and_back(header: Header, payload: bytes = b"") -> Frame:
    data = encode_header(header, STAMP, 7, len(payload))
    return decode_frame(parse_header(data), memoryview(payload))


def hidden(**changes: object) -> frame_pb2.FrameHeader:
    """A sound HIDDEN header for 3 rows of 4 f32 (48 bytes), with fields changed."""
    message = frame_pb2.FrameHeader.FromString(
        encode_header(
            Header(
                kind=FrameKind.HIDDEN,
                dtype=FrameDtype.F32,
                shape=(3, 4),
                runs=(Run(0, 5, 2, False), Run(1, 9, 1, True)),
            ),
            STAMP,
            7,
            48,
        )
    )
    for name, value in changes.items():
        if isinstance(value, list):
            message.ClearField(name)  # type: ignore[arg-type]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


index = st.integers(0, 4095)
position = st.integers(0, 2**30)
nanoseconds = st.integers(0, 2**64 - 1)
runs = st.lists(st.builds(Run, index, position, st.integers(1, 4096), st.booleans()), max_size=12).map(tuple)
ranges = st.tuples(index, position, st.integers(1, 1000)).map(lambda t: PositionRange(t[0], t[1], t[1] + t[2]))
traces = st.lists(st.builds(StageTrace, index, *[nanoseconds] * 5), max_size=4).map(tuple)
headers = st.builds(
    Header,
    kind=st.sampled_from([kind for kind in FrameKind if kind is not FrameKind.HIDDEN]),
    step=nanoseconds,
    lane=index,
    runs=runs,
    replay=st.booleans(),
    speculation_window=nanoseconds,
    discard=st.none() | ranges,
    kv_cut=st.none() | position,
    trace=traces,
    pipeline_id=st.just("pipeline-1"),
    epoch=st.just(3),
    from_stage=st.just(1),
    serial=st.just(7),
)


@given(headers, st.binary(max_size=40))
def test_every_field_survives_the_wire(header: Header, payload: bytes) -> None:
    frame = there_and_back(header, payload)
    assert frame.header == header
    assert frame.payload.tobytes() == payload


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [
        (FrameDtype.F32, np.float32),
        (FrameDtype.F16, np.float16),
        (FrameDtype.BF16, np.uint16),
        (FrameDtype.I32, np.int32),
    ],
)
def test_array_is_a_view_of_the_payload(dtype: FrameDtype, numpy_dtype: type) -> None:
    sent: NDArray[Any] = np.arange(6).astype(numpy_dtype).reshape(2, 3)
    payload = memoryview(sent.tobytes())
    data = encode_header(Header(kind=FrameKind.PROBE, dtype=dtype, shape=(2, 3)), STAMP, 1, sent.nbytes)
    array = decode_frame(parse_header(data), payload).array()
    assert np.array_equal(array, sent) and array.dtype == sent.dtype
    assert np.shares_memory(array, np.frombuffer(payload, np.uint8))


def test_frame_without_elements_has_no_array() -> None:
    with pytest.raises(CorruptFrame, match="CLOSE frame has no array"):
        there_and_back(Header(kind=FrameKind.CLOSE), b"x").array()


def test_sender_of_a_passed_on_header_is_the_new_one() -> None:
    passed_on = Header(kind=FrameKind.PROBE, pipeline_id="other", epoch=99, from_stage=99, serial=99)
    header = there_and_back(passed_on).header
    assert (header.pipeline_id, header.epoch, header.from_stage, header.serial) == ("pipeline-1", 3, 1, 7)


def test_fields_of_a_newer_peer_are_skipped() -> None:
    data = encode_header(Header(kind=FrameKind.PROBE, step=4), STAMP, 7, 0)
    unknown = b"\xf2\x3f\x03new" + b"\xf8\x3f\x05"  # fields 1022 (bytes) and 1023 (number)
    assert decode_frame(parse_header(data + unknown), memoryview(b"")).header.step == 4


@pytest.mark.parametrize(
    ("header", "payload_bytes", "problem"),
    [
        (
            Header(kind=FrameKind.HIDDEN, dtype=FrameDtype.F32, shape=(3, 4), runs=(Run(0, 0, 2, True),)),
            48,
            "match the rows",
        ),
        (
            Header(kind=FrameKind.HIDDEN, dtype=FrameDtype.F32, shape=(12,), runs=(Run(0, 0, 12, True),)),
            48,
            "match the rows",
        ),
        (Header(kind=FrameKind.HIDDEN), 0, "without elements"),
        (Header(kind=FrameKind.PROBE, dtype=FrameDtype.F32, shape=(3, 4)), 47, "is 48 bytes, the payload 47"),
        (Header(kind=FrameKind.PROBE, dtype=FrameDtype.F16, shape=(1, 1, 1, 1, 1)), 2, "5 dimensions"),
        (Header(kind=FrameKind.PROBE, dtype=FrameDtype.F16), 2, "0 dimensions"),
        (Header(kind=FrameKind.PROBE, dtype=FrameDtype.F16, shape=(0,)), 0, "shape"),
        (Header(kind=FrameKind.PROBE, dtype=FrameDtype.F16, shape=(-1, -1)), 2, "out of range"),
        (Header(kind=FrameKind.PROBE, shape=(3,)), 3, "without elements"),
        (Header(kind=FrameKind.PROBE, lane=4096), 0, "lane 4096"),
        (Header(kind=FrameKind.PROBE, lane=-1), 0, "header"),
        (Header(kind=FrameKind.PROBE, step=2**64), 0, "header"),
        (Header(kind=FrameKind.PROBE, runs=(Run(0, 0, 0, True),)), 0, "runs of 0"),
        (Header(kind=FrameKind.PROBE, runs=(Run(4096, 0, 1, True),)), 0, "slot is 4096"),
        (Header(kind=FrameKind.PROBE, runs=(Run(0, 2**31 - 1, 1, True),)), 0, "up to position"),
        (Header(kind=FrameKind.PROBE, runs=(Run(0, 0, 1, True),) * (MAX_RUNS + 1)), 0, "4100 numbers"),
        (Header(kind=FrameKind.PROBE, discard=PositionRange(0, 5, 5)), 0, "discard range"),
        (Header(kind=FrameKind.PROBE, trace=(StageTrace(0, 0, 0, 0, 0, 0),) * 65), 0, "65 stage traces"),
    ],
)
def test_frame_that_a_peer_would_drop_is_not_sent(header: Header, payload_bytes: int, problem: str) -> None:
    with pytest.raises(CorruptFrame, match=problem):
        encode_header(header, STAMP, 1, payload_bytes)


@pytest.mark.parametrize(
    ("pipeline_id", "epoch", "stage"), [("", 1, 0), ("x" * 65, 1, 0), ("é" * 33, 1, 0), ("p", 0, 0), ("p", 1, 4096)]
)
def test_sender_out_of_range_is_refused(pipeline_id: str, epoch: int, stage: int) -> None:
    with pytest.raises(CorruptFrame):
        stamp(pipeline_id, epoch, stage)


def test_largest_step_fits_a_header() -> None:
    largest = Header(
        kind=FrameKind.PROBE,
        runs=(Run(4095, 2**31 - 4097, 4096, True),) * MAX_RUNS,
        trace=(StageTrace(63, 2**64 - 1, 2**63, 2**63, 2**63, 2**63),) * 64,
    )
    data = encode_header(largest, stamp("x" * 64, 2**64 - 1, 4095), 2**64 - 1, 0)
    assert len(data) <= MAX_HEADER_BYTES


def test_header_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(CorruptFrame, match="at most 16384"):
        parse_header(b"\0" * (MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (hidden(kind=0), "unknown kind 0"),
        (hidden(kind=77), "unknown kind 77"),
        (hidden(dtype=5), "unknown dtype 5"),
        (hidden(shape=[4, 3]), "match the rows"),
        (hidden(shape=[2**32 - 1] * 4), "is .* bytes, the payload 48"),
        (hidden(shape=[3, 4, 1, 1, 1]), "5 dimensions"),
        (hidden(shape=[]), "0 dimensions"),
        (hidden(shape=[0, 2**31]), "the payload 48"),
        (hidden(lane=5000), "lane 5000"),
    ],
)
def test_inconsistent_header_is_refused(message: frame_pb2.FrameHeader, problem: str) -> None:
    with pytest.raises(CorruptFrame, match=problem):
        decode_frame(message, memoryview(bytes(48)))


@pytest.mark.parametrize("runs", [[1], [0, 0, 3], [0, 0, 3, 1, 1], [0, 0, 3, 2], [4096, 0, 3, 1], [0, 2**31, 3, 1]])
def test_malformed_runs_are_refused(runs: list[int]) -> None:
    with pytest.raises(CorruptFrame, match="run"):
        decode_frame(hidden(runs=runs), memoryview(bytes(48)))


@given(st.binary(max_size=300), st.binary(max_size=64))
def test_hostile_header_is_corrupt_or_sound(data: bytes, payload: bytes) -> None:
    check_hostile(data, payload)


@given(st.data())
def test_damaged_header_is_corrupt_or_sound(data: st.DataObject) -> None:
    message = hidden()
    message.extras.CopyFrom(frame_pb2.FrameExtras(replay=True, kv_cut=3, speculation_window=9))
    message.extras.discard.CopyFrom(frame_pb2.PositionRange(slot=1, start=2, end=3))
    message.extras.trace.add(stage=1, clock=2, received_ns=3)
    sound = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    check_hostile(bytes(sound[: data.draw(st.integers(0, len(sound)))]), bytes(48))


def check_hostile(data: bytes, payload: bytes) -> None:
    """Either CorruptFrame and nothing else, or a frame whose array can be taken."""
    try:
        frame = decode_frame(parse_header(data), memoryview(payload))
    except CorruptFrame:
        return
    if frame.header.dtype is not FrameDtype.BYTES:
        assert frame.array().nbytes == len(payload)
    if frame.header.kind is FrameKind.HIDDEN:
        assert sum(run.count for run in frame.header.runs) == frame.array().shape[0]
