"""The one thread of a stage: it owns the engine, the KV cache and the sockets, and blocks in `recv`."""

import logging
import queue
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from eldric.engine.errors import EngineError
from eldric.engine.stage import Stage, StepOutput
from eldric.engine.step import StepInput
from eldric.errors import NotReady
from eldric.transport.base import Transport
from eldric.transport.errors import ConnectFailed, LinkClosed, PeerLost, TransportError
from eldric.transport.frame import Frame
from eldric.v1 import frame_pb2, stage_pb2
from eldric.worker.commands import Command, Connect, Degrade, Rewire, Stop
from eldric.worker.ring import Ring, Times

log = logging.getLogger(__name__)

#: Longest wait in `recv`: a command wakes it, so this only bounds the time until a missed wake is noticed.
_IDLE_S = 1.0

#: Longest wait for the next stage to listen and let this one in, but for a new command.
_CONNECT_S = 10.0

#: The same, at a time: how soon a command is seen meanwhile.
_TRY_S = 1.0

#: Decode steps that the median of `step_ms` looks back on.
_REMEMBERED_STEPS = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage stands in its pipeline."""

    pipeline_id: str
    epoch: int
    index: int
    stage_count: int

    @property
    def is_tail(self) -> bool:
        return self.index == self.stage_count - 1

    @property
    def key(self) -> str:
        return f"pipeline={self.pipeline_id} stage={self.index} epoch={self.epoch}"


class ComputeThread(ABC):
    """A stage at work. `post`, `join` and the read-only attributes may be used by any thread, the rest by its own."""

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        place: Place,
        on_change: Callable[[], None],
        stood_still_s: Callable[[], float],
    ) -> None:
        """stood_still_s: for how long this process did nothing just before; see Standstill."""
        self.place = place
        self.state: stage_pb2.StageState.ValueType = stage_pb2.LOADED
        self.message = ""
        self.round = 0
        self.steps = 0
        self._stage = stage
        self._ring = Ring(transport, place.index)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._step_ns: deque[int] = deque(maxlen=_REMEMBERED_STEPS)
        self._on_change = on_change
        self._stood_still_s = stood_still_s
        self._workers: tuple[str, ...] = ()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"stage-{place.index}", daemon=True)

    def start(self) -> None:
        """Raises NotReady when the process may have no more threads."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise NotReady(f"{error}: raise the limit (ulimit -u, TasksMax=, pids.max)") from error

    def post(self, command: Command) -> None:
        """Give the thread something to do, and wake it."""
        self._commands.put(command)
        self._ring.wake()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end after a Stop. False when it did not come in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def step_ms(self) -> float:
        """Median compute time of the last decode steps, in milliseconds; 0 before the first."""
        recent = tuple(self._step_ns)
        return statistics.median(recent) / 1e6 if recent else 0.0

    @property
    def dropped_frames(self) -> dict[str, int]:
        return self._ring.dropped

    @property
    def refused_links(self) -> int:
        return self._ring.refused

    @property
    def link(self) -> stage_pb2.LinkStatus | None:
        """The link to the next stage; None before there is one."""
        return self._ring.link_status

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._guarded_turn()
        finally:
            self.discard()

    def discard(self) -> None:
        """Give sockets and memory back. For a thread that was never started; one that runs does it at its end."""
        self._ring.close()
        self._stage.close()

    def _guarded_turn(self) -> None:
        """A turn after which the stage is whole, or broken and says why."""
        try:
            self._take_commands()
            if self._stopping:
                return
            if self.state == stage_pb2.BROKEN:
                self._wait_for_mending()
            else:
                self._turn()
        except PeerLost as lost:
            self._break(self._lost(lost.stage, lost.reason))
        except LinkClosed as error:
            closed = self._ring.link_closed
            self._break(self._lost(*closed) if closed else str(error))
        except TransportError as error:
            self._break(str(error))
        except (EngineError, DecodeError) as error:
            log.exception("stage cannot go on %s", self.place.key)
            self._break(f"it was told what it cannot do: {error}"[:1024])
        except Exception:
            log.exception("stage failed %s", self.place.key)
            self._break("it failed, see its worker's log")

    @abstractmethod
    def _turn(self) -> None:
        """One round: a frame or a step."""

    def _wait_for_mending(self) -> None:
        """A stage may lose both its neighbours: the second loss must not break the ring again once it is mended.

        Frames that come now were under way when the ring broke: their sequences have ended. Those of neighbours that
        are connected again before this stage are of a later round, and wait at the transport's door.
        """
        try:
            self._ring.receive(_IDLE_S)
        except PeerLost:
            return
        except TransportError:
            self._take(self._commands.get())

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._take(self._commands.get())

    def _take(self, command: Command) -> None:
        match command:
            case Connect():
                self._connect(command)
            case Rewire():
                self._rewire(command)
            case Degrade():
                self._break(command.message)
            case Stop(reason):
                self._stopping = True
                self._end_sequences(reason)
            case _:
                raise TypeError(f"stage {self.place.index} cannot take {command}")

    def _connect(self, command: Connect) -> None:
        if not command.done.set_running_or_notify_cancel():
            return  # whoever asked for it is gone
        if (switch := command.switch) is not None:
            if switch.if_idle and not self.is_idle:
                command.done.set_result(False)
                return
            self._ring.rewire(switch.receiver, switch.sender, keep=True)
        self.round, self._workers = command.round, command.workers
        self._end_sequences("the pipeline's stages are being connected again")
        try:
            self._reach(command)
        except Exception as error:  # a third party's transport may fail in any way
            failure = error if isinstance(error, TransportError) else ConnectFailed(f"{type(error).__name__}: {error}")
            self._break(f"cannot reach the next stage: {failure}")
            command.done.set_exception(failure)
        else:
            self._change(stage_pb2.SERVING)
            command.done.set_result(True)

    def _reach(self, command: Connect) -> None:
        """Try again and again, as the next stage may not listen or not allow this one yet; a command ends it."""
        deadline = time.monotonic() + (command.try_s or _CONNECT_S)
        self._ring.fallback = command.fallback
        try_s = min(command.try_s or _TRY_S, _TRY_S)
        while True:
            try:
                return self._ring.connect(command.next, command.allowed, command.epoch, command.round, try_s)
            except ConnectFailed:
                if time.monotonic() > deadline or not self._commands.empty():
                    raise

    def _rewire(self, command: Rewire) -> None:
        is_awaited = command.done.set_running_or_notify_cancel()
        self._ring.rewire(command.receiver, command.sender)
        if is_awaited:
            command.done.set_result(None)

    @property
    @abstractmethod
    def sequences(self) -> int:
        """Sequences that hold a slot. May be read from any thread."""

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits here."""
        return not self.sequences

    @abstractmethod
    def _end_sequences(self, reason: str) -> None:
        """Nothing that runs can go on."""

    def _receive(self, timeout_s: float = _IDLE_S) -> Frame | None:
        """The next frame of this pipeline and epoch, or None. Raises PeerLost when a neighbour is gone."""
        return self._ring.receive(timeout_s)

    def _lost(self, stage: int, reason: str) -> str:
        """What happened to a neighbour, or to this stage if it is the neighbour who lost it, for people."""
        if stood_still_s := self._stood_still_s():
            return f"{self._named(self.place.index)} stood still for {stood_still_s:.1f} s and was taken for gone"
        return f"{self._named(stage)} is gone: {reason}"

    def _named(self, stage: int) -> str:
        worker = f" on worker {self._workers[stage]}" if stage < len(self._workers) else ""
        return f"stage {stage} of {self.place.stage_count}{worker}"

    def _break(self, message: str) -> None:
        """The ring is broken here."""
        if self.state != stage_pb2.BROKEN:
            log.warning("stage broken %s reason=%s", self.place.key, message)
            self._change(stage_pb2.BROKEN, message)
        self._end_sequences(message)

    def _change(self, state: "stage_pb2.StageState.ValueType", message: str = "") -> None:
        self.state, self.message = state, message
        self._on_change()

    def _compute(self, step: StepInput, received_ns: int) -> tuple[StepOutput, Times]:
        """Run the stage, and say when. All of the compute library's time is put at the end, so that what this stage
        spends in Python lies before and behind it. Raises EngineError."""
        before_ns = self._stage.compute_ns
        output = self._stage.compute(step)
        ended_ns = time.perf_counter_ns()
        library_ns = self._stage.compute_ns - before_ns
        self.steps += 1
        if step.runs[0].count == 1:
            self._step_ns.append(library_ns)
        return output, (received_ns, ended_ns - library_ns, ended_ns)


def step_error(stage: int, error: EngineError) -> frame_pb2.StepTokens:
    """The answer to a step that this stage could not compute."""
    reason = frame_pb2.StepError(stage=stage, status=error.status, message=str(error)[:1024])
    return frame_pb2.StepTokens(error=reason)
