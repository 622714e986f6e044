"""Back-pressure: how much may be under way, and when the sender is told."""

from hypothesis import given
from hypothesis import strategies as st

from eldric.transport.window import FIRST_WINDOW_FRAMES, ReceiveWindow, SendWindow
from eldric.v1 import frame_pb2


def grant(data: bytes) -> frame_pb2.LinkGrant:
    return frame_pb2.LinkGrant.FromString(data)


def test_first_frames_need_no_grant() -> None:
    sender = SendWindow()
    for _ in range(FIRST_WINDOW_FRAMES):
        assert sender.open
        sender.sent(1)
    assert not sender.open


def test_one_frame_larger_than_the_window_gets_through() -> None:
    sender, receiver = SendWindow(), ReceiveWindow(4, 100)
    sender.granted(grant(receiver.grant()))
    assert sender.open
    sender.sent(1000)
    assert not sender.open
    assert receiver.taken(1000)
    sender.granted(grant(receiver.grant()))
    assert sender.open


def test_grant_that_lies_changes_nothing() -> None:
    sender = SendWindow()
    sender.sent(10)
    sender.granted(frame_pb2.LinkGrant(taken_frames=5, window_frames=1000, window_bytes=1000))
    assert (sender.taken_frames, sender.window_frames) == (0, FIRST_WINDOW_FRAMES)


@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.lists(st.tuples(st.booleans(), st.integers(0, 150)), max_size=200),
)
def test_sender_never_exceeds_the_window_and_never_waits_for_ever(
    frames: int, size: int, moves: list[tuple[bool, int]]
) -> None:
    sender, receiver = SendWindow(), ReceiveWindow(frames, size)
    sender.granted(grant(receiver.grant()))
    queue: list[int] = []

    def take() -> None:
        if receiver.taken(queue.pop(0)):
            sender.granted(grant(receiver.grant()))

    for send, payload_bytes in moves:
        if send and sender.open:
            sender.sent(payload_bytes)
            queue.append(payload_bytes)
            assert len(queue) <= frames and sum(queue[:-1]) < size
        elif queue:
            take()
    while queue:
        take()
    assert sender.open
