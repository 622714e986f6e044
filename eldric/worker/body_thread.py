"""The compute thread of every stage but the head: hidden states in, hidden states or sampled tokens out."""

import time
from collections.abc import Callable
from typing import cast

from eldric.engine.errors import EngineError
from eldric.engine.stage import Stage
from eldric.engine.step import Run, StepInput
from eldric.transport.base import Transport
from eldric.transport.frame import Frame, FrameKind
from eldric.v1 import frame_pb2
from eldric.worker.compute_thread import ComputeThread, Place, step_error
from eldric.worker.tail import Tail


class BodyThread(ComputeThread):
    """A middle stage, or the tail of a pipeline of several stages."""

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        place: Place,
        on_change: Callable[[], None],
        stood_still_s: Callable[[], float],
    ) -> None:
        super().__init__(stage, transport, place, on_change, stood_still_s)
        self._tail = Tail(place.index, stage.spec.vocab_size) if place.is_tail else None
        self._slots: set[int] = set()

    @property
    def sequences(self) -> int:
        return len(self._slots)

    def _end_sequences(self, reason: str) -> None:
        self._slots.clear()

    def _turn(self) -> None:
        frame = self._receive()
        if frame is None:
            return
        match frame.header.kind:
            case FrameKind.HIDDEN:
                self._step(frame)
            case FrameKind.OPEN:
                self._open(frame)
            case FrameKind.CLOSE:
                self._close(frame)
            case FrameKind.TOKENS | FrameKind.PROBE:  # an earlier stage's error, and what only passes by
                self._ring.pass_on(frame)

    def _step(self, frame: Frame) -> None:
        received_ns = time.perf_counter_ns()
        header = frame.header
        runs = cast(tuple[Run, ...], header.runs)  # the transport's have the same fields in the same order
        try:
            output, times = self._compute(StepInput(runs, hidden=frame.array()), received_ns)
            answer = self._tail.answer(runs, output, self._stage.final) if self._tail is not None else None
        except EngineError as error:
            self._ring.send_tokens(header, step_error(self.place.index, error), (received_ns,) * 3)
            return
        if answer is None:
            assert output.hidden is not None
            self._ring.send_hidden(header, output.hidden, times)
        else:
            self._ring.send_tokens(header, answer, times)

    def _open(self, frame: Frame) -> None:
        message = frame_pb2.SequenceOpen.FromString(bytes(frame.payload))
        self._stage.truncate(message.slot, message.first_position)
        self._slots.add(message.slot)
        if self._tail is None:
            self._ring.pass_on(frame)
        else:
            self._tail.open(message)

    def _close(self, frame: Frame) -> None:
        slot = frame_pb2.SequenceClose.FromString(bytes(frame.payload)).slot
        self._slots.discard(slot)
        if self._tail is None:
            self._ring.pass_on(frame)
        else:
            self._tail.close(slot)
