"""What a stage lets in, and that it counts what it does not."""

from hypothesis import given
from hypothesis import strategies as st

from eldric.transport.codec import encode_header, stamp
from eldric.transport.filter import FrameFilter, Sender
from eldric.transport.frame import MAX_HEADER_BYTES, PROTOCOL_VERSION, FrameKind, Header


def header(serial: int, *, pipeline: str = "p", epoch: int = 2, stage: int = 1, payload_bytes: int = 0) -> bytes:
    return encode_header(Header(kind=FrameKind.PROBE), stamp(pipeline, epoch, stage), serial, payload_bytes)


def make_filter(**options: int) -> FrameFilter:
    door = FrameFilter("p", **options)
    door.set_epoch(2)
    return door


def admit(door: FrameFilter, sender: Sender, data: bytes, payload: bytes = b"") -> bool:
    return door.admit(data, memoryview(payload), sender) is not None


def only_dropped(door: FrameFilter) -> dict[str, int]:
    return {reason: count for reason, count in door.dropped.items() if count}


def test_sound_frames_come_in() -> None:
    door, sender = make_filter(), Sender(1)
    assert all(admit(door, sender, header(serial)) for serial in (1, 2, 5))
    assert only_dropped(door) == {}


def test_every_drop_is_counted_by_its_reason() -> None:
    door, sender = make_filter(max_payload_bytes=10), Sender(1)
    refused = [
        (b"\xff\xff", b""),
        (bytes(MAX_HEADER_BYTES + 1), b""),
        (header(1), b"bytes that the kind does not say"),
        (header(1).replace(bytes((8, PROTOCOL_VERSION)), bytes((8, PROTOCOL_VERSION + 1)), 1), b""),
        (header(1, pipeline="q"), b""),
        (header(1, stage=2), b""),
        (header(1, epoch=1), b""),
    ]
    assert not any(admit(door, sender, data, payload) for data, payload in refused)
    assert only_dropped(door) == {
        "corrupt": 2,
        "oversized": 1,
        "unknown_protocol": 1,
        "wrong_pipeline": 1,
        "wrong_stage": 1,
        "stale_epoch": 1,
    }


def test_replayed_serial_is_dropped() -> None:
    door, sender = make_filter(), Sender(1)
    assert [admit(door, sender, header(serial)) for serial in (3, 3, 2, 4, 0)] == [True, False, False, True, False]
    assert only_dropped(door) == {"replayed": 3}


def test_serials_of_two_links_are_their_own() -> None:
    door = make_filter()
    assert admit(door, Sender(1), header(1)) and admit(door, Sender(1), header(1))


def test_corrupt_frame_does_not_use_up_its_serial() -> None:
    door, sender = make_filter(), Sender(1)
    assert not admit(door, sender, header(1)[:-1] + b"\xff")
    assert admit(door, sender, header(1))


def test_frames_of_a_newer_epoch_wait_for_it_in_order() -> None:
    door, sender = make_filter(), Sender(1)
    assert not any(admit(door, sender, header(serial, epoch=3)) for serial in (1, 2))
    assert door.released() is None
    door.set_epoch(3)
    frames = [door.released(), door.released(), door.released()]
    assert [frame and frame.header.serial for frame in frames] == [1, 2, None]
    assert admit(door, sender, header(3, epoch=3))
    assert only_dropped(door) == {}


def test_frames_of_a_skipped_epoch_are_stale() -> None:
    door, sender = make_filter(), Sender(1)
    admit(door, sender, header(1, epoch=3))
    admit(door, sender, header(2, epoch=9))
    door.set_epoch(4)
    assert door.released() is None and only_dropped(door) == {"stale_epoch": 1}
    door.set_epoch(9)
    assert door.released() is not None


def test_frame_that_waits_unread_is_stale_in_the_next_epoch() -> None:
    door, sender = make_filter(), Sender(1)
    admit(door, sender, header(1, epoch=3))
    door.set_epoch(3)
    door.set_epoch(4)
    assert door.released() is None and only_dropped(door) == {"stale_epoch": 1}


def test_waiting_frames_are_bounded() -> None:
    door, sender = make_filter(early_frames=2), Sender(1)
    for serial in (1, 2, 3):
        admit(door, sender, header(serial, epoch=3))
    assert only_dropped(door) == {"early_epoch": 1}
    door, sender = make_filter(early_bytes=10), Sender(1)
    for serial in (1, 2, 3):
        admit(door, sender, header(serial, epoch=3), bytes(5))
    assert only_dropped(door) == {"early_epoch": 1}


@given(st.lists(st.tuples(st.binary(max_size=80), st.binary(max_size=8)), max_size=8))
def test_hostile_bytes_never_raise(messages: list[tuple[bytes, bytes]]) -> None:
    door, sender = make_filter(), Sender(1)
    for data, payload in messages:
        admit(door, sender, data, payload)
    assert sum(door.dropped.values()) == len(messages)
