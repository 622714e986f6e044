"""The compute thread of the head: the schedule, stage 0, and what comes back from the tail."""

import time
from collections.abc import Callable, Sequence

from eldric.engine.errors import EngineError
from eldric.engine.schedule import Close, Finish, Open, Scheduler, Step
from eldric.engine.stage import Stage
from eldric.engine.step import StepInput
from eldric.errors import EldricError, PipelineDegraded, Unavailable
from eldric.transport.base import Transport
from eldric.transport.frame import Frame, FrameKind, StageTrace
from eldric.v1 import frame_pb2, stage_pb2
from eldric.worker.commands import Cancel, Command, Follow, Shut, Submit
from eldric.worker.compute_thread import ComputeThread, Place, step_error
from eldric.worker.generation import Admitted, Ended, Failed, Generation, Happening, Token
from eldric.worker.tail import Tail

#: What the compute thread hands to the control loop at a time.
News = list[tuple[Generation, Happening]]


class StepFailed(EldricError):
    """A stage could not compute a step of this sequence. Carries the status that the stage gave."""

    def __init__(self, error: frame_pb2.StepError) -> None:
        super().__init__(f"stage {error.stage}: {error.message}")
        self.status = error.status


class HeadThread(ComputeThread):
    """Stage 0. `deliver` and `trace` are called in this thread and must hand over to the control loop."""

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        place: Place,
        on_change: Callable[[], None],
        stood_still_s: Callable[[], float],
        scheduler: Scheduler,
        deliver: Callable[[News], None],
        trace: Callable[[stage_pb2.StepTrace], None],
    ) -> None:
        super().__init__(stage, transport, place, on_change, stood_still_s)
        self._scheduler = scheduler
        self._deliver = deliver
        self._trace = trace
        self._tail = Tail(place.index, stage.spec.vocab_size) if place.is_tail else None
        self._generations: dict[str, Generation] = {}
        self._entered: dict[int, Step] = {}

    @property
    def sequences(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot. May be read from any thread."""
        return self._scheduler.waiting

    @property
    def is_idle(self) -> bool:
        return not (self.sequences or self.waiting)

    def _turn(self) -> None:
        while self._scheduler.in_flight and (frame := self._receive(0)) is not None:
            self._frame(frame)
        match self._scheduler.next_action():
            case Step() as step:
                self._step(step)
            case Open(sequence):
                self._open(self._generations[sequence.id])
            case Close(slot):
                self._close(slot)
            case None:
                if (frame := self._receive()) is not None:
                    self._frame(frame)

    def _take(self, command: Command) -> None:
        match command:
            case Submit(generation):
                self._submit(generation)
            case Cancel(generation):
                if generation.sequence.id in self._generations:
                    self._scheduler.cancel(generation.sequence)
                    self._finish([(generation, Ended(Finish.CANCELLED, time.perf_counter_ns()))])
            case Follow(enabled):
                self._ring.tracing = enabled
            case Shut(reason):
                waiting = self._scheduler.cancel_waiting()
                self._finish([(self._generations[each.id], Failed(Unavailable(reason))) for each in waiting])
            case _:
                super()._take(command)

    def _submit(self, generation: Generation) -> None:
        if self.state != stage_pb2.SERVING:
            self._finish([(generation, Failed(PipelineDegraded(self.message or "the pipeline is not connected")))])
            return
        try:
            self._scheduler.submit(generation.sequence)
        except EngineError as error:
            self._finish([(generation, Failed(error))])
        else:
            self._generations[generation.sequence.id] = generation

    def _open(self, generation: Generation) -> None:
        sequence = generation.sequence
        message = frame_pb2.SequenceOpen(
            slot=sequence.slot,
            sequence_id=sequence.id,
            sampling=generation.sampling,
            first_position=sequence.reused,
            embed=generation.embeds,
        )
        if _has_penalties(generation):
            message.prompt.extend(sequence.prompt.tolist())
        self._stage.truncate(sequence.slot, sequence.reused)
        if self._tail is not None:
            self._tail.open(message)
        else:
            self._ring.send_control(FrameKind.OPEN, message.SerializeToString())
        self._deliver([(generation, Admitted(time.perf_counter_ns()))])

    def _close(self, slot: int) -> None:
        if self._tail is not None:
            self._tail.close(slot)
        else:
            message = frame_pb2.SequenceClose(slot=slot)
            self._ring.send_control(FrameKind.CLOSE, message.SerializeToString())

    def _step(self, step: Step) -> None:
        try:
            output, times = self._compute(StepInput(step.runs, tokens=step.tokens), time.perf_counter_ns())
            answer = self._tail.answer(step.runs, output, self._stage.final) if self._tail is not None else None
        except EngineError as error:
            self._failed(step.number, step_error(0, error).error)
            return
        self._entered[step.number] = step
        if answer is not None:
            self._answered(step.number, answer, self._ring.trace(times) if self._ring.tracing else ())
        else:
            assert output.hidden is not None
            self._ring.send_step(step, output.hidden, times)

    def _frame(self, frame: Frame) -> None:
        if frame.header.kind is not FrameKind.TOKENS:
            return
        answer = frame_pb2.StepTokens.FromString(bytes(frame.payload))
        if answer.HasField("error") and not answer.error.slots:
            self._failed(frame.header.step, answer.error)
        else:
            self._answered(frame.header.step, answer, frame.header.trace)

    def _answered(self, number: int, answer: frame_pb2.StepTokens, stages: Sequence[StageTrace]) -> None:
        """The tail's tokens of a step: give them on, and let the schedule go on."""
        now = time.perf_counter_ns()
        step = self._entered.pop(number, None)
        sampled = {token.slot: token for token in answer.tokens}
        outcomes = self._scheduler.step_done(number, [(slot, token.token) for slot, token in sampled.items()], now)
        news: News = []
        for outcome in outcomes:
            generation = self._generations[outcome.sequence.id]
            if outcome.delivered:
                news.append((generation, Token(sampled[outcome.slot], now)))
            if outcome.finish is not None:
                del self._generations[outcome.sequence.id]
                news.append((generation, Ended(outcome.finish, now)))
        if news:
            self._deliver(news)
        if answer.error.slots and step is not None:
            self._fail_slots(step, answer.error)
        if stages and step is not None:
            self._follow(step, stages, now)

    def _follow(self, step: Step, stages: Sequence[StageTrace], returned_ns: int) -> None:
        self._trace(
            stage_pb2.StepTrace(
                step=step.number,
                rows=len(step.tokens),
                prefill=step.is_chunk,
                stages=[frame_pb2.StageTrace(**stage._asdict()) for stage in stages],
                returned_ns=returned_ns,
                delivered_ns=time.perf_counter_ns(),
            )
        )

    def _failed(self, number: int, error: frame_pb2.StepError) -> None:
        self._entered.pop(number, None)
        failed = self._scheduler.step_failed(number)
        self._finish([(self._generations[sequence.id], Failed(StepFailed(error))) for sequence in failed])

    def _fail_slots(self, step: Step, error: frame_pb2.StepError) -> None:
        """Some of a step's sequences failed, not the step."""
        slots = set(error.slots)
        for sequence, run in zip(step.sequences, step.runs, strict=True):
            generation = self._generations.get(sequence.id)
            if run.slot in slots and generation is not None and generation.sequence is sequence:
                self._scheduler.fail(sequence)
                self._finish([(generation, Failed(StepFailed(error)))])

    def _end_sequences(self, reason: str) -> None:
        self._entered.clear()
        ended = self._scheduler.cancel_all()
        self._finish([(self._generations[sequence.id], Failed(PipelineDegraded(reason))) for sequence in ended])

    def _finish(self, news: News) -> None:
        for generation, _ in news:
            self._generations.pop(generation.sequence.id, None)
        if news:
            self._deliver(news)


def _has_penalties(generation: Generation) -> bool:
    sampling = generation.sampling
    return (
        sampling.repetition_penalty not in (0.0, 1.0)
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
