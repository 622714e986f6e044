"""Continuous batching at the head of a pipeline: which micro-batch enters the ring next.

Pure: it knows no socket, clock or thread. The head asks `next_action` whenever stage 0 is free, and reports every step
that came back from the tail with `step_done`.

Sequences in decode are grouped into at most `lanes` steps in flight, so that every stage of a ring of that many
stages has one to compute; into fewer where that turns out to be faster (eldric.engine.lanes). Prompts go in as chunks
that end at multiples of `chunk`, back to back: a chunk that makes no token is not waited for. A step holds either one
chunk of one sequence or one token of each of several sequences, so the shapes in which a prompt is computed depend on
that prompt alone. Where bits do not depend on them, a short prompt is cut into shorter chunks, so that more than one
stage has some of it.

What a slot holds when its sequence ends stays there: a prompt that begins alike is computed from where it differs. It
is taken over only where that gives the bits that computing it anew would give: all of it where bits do not depend on
chunks, else whole chunks of prompts.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from eldric.engine.errors import EngineError
from eldric.engine.lanes import Lanes
from eldric.engine.slots import FreeSlots
from eldric.engine.step import Run, Tokens

#: What a step takes besides its rows, in rows: 3 to 7, as measured with weights of 4 to 6 bits.
_FIXED_ROWS = 4
#: Rows that are multiplied at once: a chunk is a multiple of them.
_TILE_ROWS = 16


class InvalidSequence(EngineError):
    """A request that this pipeline can never run. Says which bound it breaks."""

    status = "INVALID_ARGUMENT"


class QueueFull(EngineError):
    """Every slot is taken and the queue is full. Retryable."""

    status = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Bounds of a head's schedule."""

    slots: int  # sequences that hold KV rows at once
    context: int  # tokens that a slot holds, prompt and answer together
    chunk: int  # most prompt tokens in one step
    lanes: int  # most decode steps in flight
    decode_rows: int  # most sequences in one decode step
    queue: int  # sequences that may wait for a slot
    stages: int = 1
    cuts_freely: bool = False  # whether chunks of any length give a prompt the same bits

    @property
    def chunks_in_flight(self) -> int:
        """One chunk in each stage and one waiting, so that no stage runs dry between two."""
        return self.lanes + 1

    def chunk_of(self, prompt: int) -> int:
        """Tokens of a chunk, for a prompt of so many.

        A prompt passes S stages in (prompt / chunk + S - 1) steps, of which each takes as long as its rows and some
        more: that is shortest at the root of prompt * some more / (S - 1).
        """
        if not self.cuts_freely or self.stages == 1:
            return self.chunk
        shortest = math.sqrt(prompt * _FIXED_ROWS / (self.stages - 1))
        return min(self.chunk, max(1, round(shortest / _TILE_ROWS)) * _TILE_ROWS)


class SequenceState(Enum):
    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # part of its prompt has still to be sent
    IN_FLIGHT = "in flight"  # a step that will give its next token is in the ring
    READY = "ready"  # its next token is known and can be sent
    DONE = "done"


class Finish(Enum):
    STOP = "stop"  # one of its stop tokens
    LENGTH = "length"  # its token limit, or the slot is full
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in progress."""

    id: str
    prompt: Tokens  # [tokens] int32, at least one
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    ignores_cache: bool = False  # whether all of the prompt is computed, whatever a slot holds
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    reused: int = 0  # first tokens of the prompt that the slot held already
    position: int = 0  # tokens that were sent into the ring, those included
    generated: int = 0
    last_token: int = -1
    sent: list[int] = field(default_factory=list)  # of the generated tokens, those that were sent into the ring


@dataclass(frozen=True, slots=True)
class Open:
    """The sequence takes its slot in every stage."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Close:
    """The slot is free in every stage once this has passed."""

    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """A micro-batch for the ring. tokens: [rows] int32, in the order of the runs."""

    number: int
    lane: int
    runs: tuple[Run, ...]
    tokens: Tokens
    sequences: tuple[Sequence, ...]  # of the runs, in order

    @property
    def is_chunk(self) -> bool:
        """Whether it holds prompt tokens."""
        return self.runs[0].position < len(self.sequences[0].prompt)


Action = Open | Close | Step


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a token did to its sequence. `delivered` is false for a stop token, which is not part of the answer."""

    sequence: Sequence
    slot: int  # that it had: a sequence that finishes gives it back
    delivered: bool
    finish: Finish | None


@dataclass(slots=True)
class Scheduler:
    """State of a head's schedule. Not thread-safe: the head's compute thread owns it."""

    config: ScheduleConfig
    _free: FreeSlots = field(init=False)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _prefill: deque[Sequence] = field(default_factory=deque)
    _ready: deque[Sequence] = field(default_factory=deque)
    _slots: dict[int, Sequence] = field(default_factory=dict)
    _in_flight: dict[int, Step] = field(default_factory=dict)
    _control: deque[Action] = field(default_factory=deque)
    _chunks_in_flight: int = 0
    _decodes_since_chunk: int = 0
    _step: int = 0
    _lanes: Lanes = field(init=False)

    def __post_init__(self) -> None:
        self._lanes = Lanes(self.config.lanes, self.config.decode_rows)
        self._free = FreeSlots(self.config.slots)

    @property
    def running(self) -> int:
        return len(self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence, or give it a slot at once.

        Raises InvalidSequence when it cannot fit the context, QueueFull when no slot and no place in the queue is free.
        """
        length = len(sequence.prompt)
        if length == 0:
            raise InvalidSequence("the prompt is empty")
        if length >= self.config.context:
            raise InvalidSequence(
                f"the prompt has {length} tokens, and the context of {self.config.context} must hold the answer too"
            )
        if not self._free and len(self._waiting) >= self.config.queue:
            raise QueueFull(f"all {self.config.slots} slots are taken and {len(self._waiting)} requests wait")
        room = self.config.context - length
        sequence.max_tokens = min(sequence.max_tokens, room) if sequence.max_tokens > 0 else room
        self._waiting.append(sequence)
        self._admit()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now. Steps of it that are in the ring come back and are ignored."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            sequence.state = SequenceState.DONE
        elif sequence.state is not SequenceState.DONE:
            self._end(sequence)

    def fail(self, sequence: Sequence) -> None:
        """End a sequence that went astray: nothing that its slot holds is of use."""
        if sequence.state is not SequenceState.DONE:
            self._end(sequence, keeps=False)

    def cancel_waiting(self) -> list[Sequence]:
        """End every sequence that has no slot yet. Returns them."""
        ended = list(self._waiting)
        for sequence in ended:
            self.cancel(sequence)
        return ended

    def cancel_all(self) -> list[Sequence]:
        """End every sequence and forget every step in flight: the ring is broken. Returns those that had not ended."""
        ended = [*self._slots.values(), *self._waiting]
        for sequence in ended:
            self.cancel(sequence)
        self._in_flight.clear()
        self._control.clear()
        self._chunks_in_flight = 0
        self._free.forget_all()
        self._lanes.disturbed()
        return ended

    def next_action(self) -> Action | None:
        """What stage 0 should do now, or None when it has to wait for a step or a request."""
        if self._control:
            return self._control.popleft()
        decoding = self._decoding if self._ready else 0
        lanes = self._lanes.count(decoding) if decoding else 0
        decode = self._decodes_in_flight < lanes
        prefill = bool(self._prefill) and self._chunks_in_flight < self.config.chunks_in_flight
        if prefill and not (decode and self._decodes_since_chunk < lanes):
            self._decodes_since_chunk = 0
            return self._chunk_step(self._prefill[0])
        if decode:
            self._decodes_since_chunk += 1
            return self._decode_step(-(-decoding // lanes))
        return None

    def step_done(self, number: int, tokens: Iterable[tuple[int, int]], now_ns: int) -> list[Outcome]:
        """A step came back from the tail with (slot, token) for each run with logits. Unknown steps are ignored."""
        step = self._in_flight.get(number)
        if step is None:
            return []
        if step.is_chunk or self._chunks_in_flight or self._prefill:
            self._lanes.disturbed()
        else:
            self._lanes.returned(self._decoding, len(step.sequences), now_ns)
        del self._in_flight[number]
        if step.is_chunk:
            self._chunks_in_flight -= 1
        by_slot = dict(tokens)
        outcomes = []
        for sequence, run in zip(step.sequences, step.runs, strict=True):
            if run.logits and sequence.state is SequenceState.IN_FLIGHT and run.slot in by_slot:
                outcomes.append(self._token(sequence, by_slot[run.slot]))
        return outcomes

    def step_failed(self, number: int) -> list[Sequence]:
        """A stage could not compute a step: its sequences end. Returns them."""
        step = self._in_flight.pop(number, None)
        if step is None:
            return []
        if step.is_chunk:
            self._chunks_in_flight -= 1
        failed = [sequence for sequence in step.sequences if sequence.state is not SequenceState.DONE]
        for run in step.runs:
            self._free.forget(run.slot)  # of a sequence that ended meanwhile
        for sequence in failed:
            self._end(sequence, keeps=False)
        return failed

    @property
    def _decodes_in_flight(self) -> int:
        return len(self._in_flight) - self._chunks_in_flight

    @property
    def _decoding(self) -> int:
        """Sequences that are in decode steps, or could be."""
        return len(self._ready) + sum(len(step.sequences) for step in self._in_flight.values() if not step.is_chunk)

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            unit = 1 if self.config.cuts_freely else self.config.chunk
            sequence.slot, held = self._free.take(sequence.prompt, unit)
            sequence.position = sequence.reused = 0 if sequence.ignores_cache else held
            sequence.state = SequenceState.PREFILL
            self._slots[sequence.slot] = sequence
            self._control.append(Open(sequence))
            self._prefill.append(sequence)

    def _end(self, sequence: Sequence, *, keeps: bool = True) -> None:
        """keeps: whether what its slot holds is sound."""
        if sequence.state is SequenceState.PREFILL:
            self._prefill.remove(sequence)
        elif sequence.state is SequenceState.READY:
            self._ready.remove(sequence)
        sequence.state = SequenceState.DONE
        del self._slots[sequence.slot]
        self._free.give_back(sequence.slot, self._held(sequence) if keeps else sequence.prompt[:0])
        opening = Open(sequence)
        if opening in self._control:
            self._control.remove(opening)  # no stage has heard of it
        else:
            self._control.append(Close(sequence.slot))
        self._admit()

    def _held(self, sequence: Sequence) -> Tokens:
        """What its slot holds that another sequence may go on from."""
        prompt = sequence.prompt[: sequence.position]
        if not self.config.cuts_freely:
            return prompt[: len(prompt) // self.config.chunk * self.config.chunk]
        return np.concatenate((prompt, np.array(sequence.sent, np.int32)))

    def _token(self, sequence: Sequence, token: int) -> Outcome:
        sequence.generated += 1
        sequence.last_token = token
        finish = None
        if token in sequence.stop_tokens:
            finish = Finish.STOP
        elif sequence.generated >= sequence.max_tokens:
            finish = Finish.LENGTH
        if finish is None:
            sequence.state = SequenceState.READY
            self._ready.append(sequence)
        else:
            self._end(sequence)
        return Outcome(sequence, sequence.slot, delivered=finish is not Finish.STOP, finish=finish)

    def _chunk_step(self, sequence: Sequence) -> Step:
        begin, chunk = sequence.position, self.config.chunk_of(len(sequence.prompt) - sequence.reused)
        end = min(len(sequence.prompt), (begin // chunk + 1) * chunk)
        last = end == len(sequence.prompt)
        if last:
            self._prefill.popleft()
            sequence.state = SequenceState.IN_FLIGHT
        sequence.position = end
        self._chunks_in_flight += 1
        run = Run(sequence.slot, begin, end - begin, last)
        return self._send((run,), sequence.prompt[begin:end], (sequence,))

    def _decode_step(self, share: int) -> Step:
        """share: of each lane, in sequences."""
        count = min(len(self._ready), share, self.config.decode_rows)
        group = sorted((self._ready.popleft() for _ in range(count)), key=lambda sequence: sequence.slot)
        runs = tuple(Run(sequence.slot, sequence.position, 1, True) for sequence in group)
        tokens = np.fromiter((sequence.last_token for sequence in group), np.int32, count)
        for sequence in group:
            sequence.position += 1
            sequence.sent.append(sequence.last_token)
            sequence.state = SequenceState.IN_FLIGHT
        return self._send(runs, tokens, tuple(group))

    def _send(self, runs: tuple[Run, ...], tokens: Tokens, sequences: tuple[Sequence, ...]) -> Step:
        self._step += 1
        taken = {step.lane for step in self._in_flight.values()}
        lane = next(lane for lane in range(len(taken) + 1) if lane not in taken)
        step = Step(self._step, lane, runs, tokens, sequences)
        self._in_flight[step.number] = step
        return step
