"""One stage at work: token ids or hidden states in, hidden states or logits out, with a KV cache beside it."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import InvalidStep
from eldric.engine.ggml.library import find_library
from eldric.engine.ggml.mapping import Fetch
from eldric.engine.ggml.model import GgmlModel, ModelOptions
from eldric.engine.ggml.weights import WeightsMode
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, Shard, shard_of
from eldric.engine.spec import ModelSpec, spec_of
from eldric.engine.step import Hidden, Run, StepInput, Tokens
from eldric.engine.tensor_types import TensorType

KVType = Literal["f16", "f32"]
Logits = NDArray[np.float32]

_I32, _F32 = np.dtype(np.int32), np.dtype(np.float32)
_MAX_ROWS = 1 << 16  # of a chunk or a lane, and most slots: far above what pays
_MAX_CONTEXT = 1 << 26


@dataclass(frozen=True, slots=True)
class StageConfig:
    """How to run a stage. Raises InvalidStep for a size that is not positive or beyond all use."""

    layers: LayerRange
    context: int  # most tokens of a sequence
    slots: int  # most sequences at once
    chunk: int  # most tokens of a prompt in one run
    lane_slots: int  # most sequences that a decode step computes together
    lanes: int = 1  # decode steps that share all sequences when each stage has one: what `exact` is decided by
    threads: int = 1
    cpus: tuple[int, ...] | None = None  # pin the computing threads to these
    exact: bool | None = False  # the same bits for a sequence, whatever else is in its step; None: where it is cheap
    device: str = "cpu"
    weights: WeightsMode = "auto"
    kv_type: KVType = "f16"
    repack_budget_bytes: int | None = None  # most memory for repacked copies of weights; None: no bound
    lock: bool = False  # keep mapped weights from being evicted, as far as the process may

    def __post_init__(self) -> None:
        limits = {"context": _MAX_CONTEXT, "slots": _MAX_ROWS, "chunk": _MAX_ROWS, "lane_slots": _MAX_ROWS}
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise InvalidStep(f"{name} is {getattr(self, name)}, expected 1 to {limit}")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that a stage holds. Mapped ones are pages of the page cache, which stages of one machine share."""

    mapped: int
    repacked: int  # private copies of weights
    kv: int
    compute: int
    locked: int = 0  # of the mapped ones: never evicted

    @property
    def total(self) -> int:
        return self.mapped + self.repacked + self.kv + self.compute


@dataclass(slots=True)
class StepOutput:
    """What a step gives. It and its arrays are valid until the next step, which may use them again.

    hidden: [rows, hidden_size], None on the tail. logits: [runs that want them, vocab_size] in the order of the runs,
    on the tail; None elsewhere, and when no run wants any. likeliest: for each row of logits, the token with the
    largest one, negative where the logits are not numbers; None where the device does not look for it.
    """

    hidden: Hidden | None
    logits: Logits | None
    likeliest: list[int] | None = None


class Stage:
    """A layer range of a model on one device. One thread at a time may use it."""

    def __init__(self, spec: ModelSpec, shard: Shard, config: StageConfig, model: GgmlModel) -> None:
        """Use Stage.load."""
        self.spec, self.shard, self.config = spec, shard, config
        self._model = model
        self._held = [0] * config.slots
        self._output = StepOutput(None, None)
        self._vocab_size, self._hidden_size = spec.vocab_size, spec.hidden_size
        self._slot_count, self._chunk, self._context = config.slots, config.chunk, config.context
        self._is_head, self._is_tail, self._closed = shard.is_head, shard.is_tail, False
        self._lane = min(config.lane_slots, config.slots)
        if model.exact:
            self._lane = min(self._lane, model.exact_rows())

    @classmethod
    def load(
        cls,
        model: ModelFile,
        config: StageConfig,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        fetch: Fetch | None = None,
    ) -> Self:
        """Map the shard's byte ranges, bring them in, and take the memory for everything else.

        progress gets (bytes done, bytes in all) again and again; cancelled is asked as often. fetch, if given, brings
        bytes of the files into the page cache before they are mapped. The model may be closed afterwards. Raises
        InvalidLayers, InvalidModel, UnsupportedModel, ModelUnreadable, OutOfMemory, LibraryError or LoadCancelled;
        everything is given back then.
        """
        spec = spec_of(model)
        shard = shard_of(model, spec, config.layers)
        options = ModelOptions(
            context=config.context,
            slots=config.slots,
            chunk=config.chunk,
            decode_rows=min(config.lane_slots, config.slots),
            lanes=config.lanes,
            threads=config.threads,
            cpus=config.cpus,
            device=config.device,
            weights=config.weights,
            kv_type=TensorType[config.kv_type.upper()],
            pack_budget_bytes=config.repack_budget_bytes,
            exact=config.exact,
            lock=config.lock,
        )
        made = GgmlModel(find_library(), model, spec, shard, options, progress, cancelled, fetch)
        return cls(spec, shard, config, made)

    @property
    def memory(self) -> MemoryUse:
        """What the stage holds now; nothing once it is closed."""
        if self._closed:
            return MemoryUse(0, 0, 0, 0)
        model = self._model
        return MemoryUse(
            model.mapped_bytes, model.copied_bytes, model.kv_bytes, model.compute_bytes, model.locked_bytes
        )

    @property
    def compute_ns(self) -> int:
        """Nanoseconds inside of ggml, in all steps so far: the rest of a step's time is Python's."""
        return self._model.compute_ns

    @property
    def lane_slots(self) -> int:
        """Most sequences that a decode step computes together; one with more is computed in parts."""
        return self._lane

    @property
    def cuts_freely(self) -> bool:
        """Whether a prompt gets the same bits in chunks of any length, here and in the model's other stages."""
        return self._model.cuts_freely

    @property
    def exact(self) -> bool:
        """Whether a sequence gets the same bits whatever else is in its step: as configured, or decided at the load."""
        return self._model.exact

    def exact_rows(self) -> int:
        """Most sequences of a decode step that may be computed together with each getting the bits it gets alone."""
        return self._model.exact_rows()

    def held(self, slot: int) -> int:
        """How many positions of a slot, from 0, hold keys and values. Raises InvalidStep for an unknown slot."""
        self._check_slot(slot)
        return self._held[slot]

    def truncate(self, slot: int, position: int) -> None:
        """Forget what a slot holds from a position on. Raises InvalidStep for an unknown slot or position."""
        self._check_slot(slot)
        if position < 0:
            raise InvalidStep(f"position {position} is negative")
        self._held[slot] = min(self._held[slot], position)

    def compute(self, step: StepInput) -> StepOutput:
        """Run the stage's layers on a step's rows, whose keys and values the runs' slots then hold.

        A run may begin at most where its slot's positions end; what the slot held behind it is forgotten. Raises
        InvalidStep, with nothing changed, for a step that breaks a bound.
        """
        runs, held = step.runs, self._held
        longest = self._admit(step)
        try:
            if longest == 1 and len(runs) <= self._lane:
                output = self._decode(runs, step.tokens, step.hidden)
            elif len(runs) == 1:
                output = self._run_chunk(runs[0], step.tokens, step.hidden)
            else:
                output = self._compute_in_parts(step)
        except BaseException:
            for slot, position, _, _ in runs:
                held[slot] = position  # what is behind was perhaps written over
            raise
        for slot, position, count, _ in runs:
            held[slot] = position + count
        return output

    def final(self) -> Hidden:
        """What the logits of the last step were made of: [hidden_size], behind the output norm. Valid until the next.

        Raises InvalidStep unless that was a step of one run with logits, on the tail.
        """
        rows = self._model.final()
        if rows is None or len(rows) != 1:
            raise InvalidStep("the last step did not compute one row of logits")
        row: Hidden = rows[0]
        return row

    def close(self) -> None:
        """Give back all maps and buffers. Arrays of earlier outputs must not be touched any more."""
        self._closed, self._slot_count = True, 0  # no slots: every further step is refused
        self._model.close()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed buffers of less than 32 MiB for itself

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, runs: Sequence[Run], tokens: Tokens | None, hidden: Hidden | None) -> StepOutput:
        """Runs of one row each, as many as one graph computes."""
        output = self._output
        if not self._is_tail:
            output.hidden = self._model.decode(runs, tokens, hidden, False)
            return output
        wanted = [index for index, run in enumerate(runs) if run.logits]
        logits = self._model.decode(runs, tokens, hidden, bool(wanted))
        output.logits, output.likeliest = logits, self._model.likeliest()
        if logits is not None and len(wanted) < len(runs):
            output.logits = logits[wanted]
            output.likeliest = output.likeliest and [output.likeliest[index] for index in wanted]
        return output

    def _run_chunk(self, run: Run, tokens: Tokens | None, hidden: Hidden | None) -> StepOutput:
        """One run of several rows."""
        output = self._output
        rows = self._model.run_chunk(run, tokens, hidden, self._is_tail and run.logits)
        if self._is_tail:
            output.logits, output.likeliest = rows, self._model.likeliest()
        else:
            output.hidden = rows
        return output

    def _compute_in_parts(self, step: StepInput) -> StepOutput:
        """Any mixture of runs: each long one by itself, the others in groups of one row each."""
        starts = np.cumsum([0, *(run.count for run in step.runs)])
        order = {index: place for place, index in enumerate(i for i, run in enumerate(step.runs) if run.logits)}
        hidden = None if self._is_tail else np.empty((step.rows, self.spec.hidden_size), np.float32)
        logits = np.empty((len(order), self.spec.vocab_size), np.float32) if self._is_tail and order else None
        for part in self._parts(step.runs):
            runs = [step.runs[index] for index in part]
            rows = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in part])
            tokens = None if step.tokens is None else step.tokens[rows]
            states = None if step.hidden is None else step.hidden[rows]
            if runs[0].count > 1:
                output = self._run_chunk(runs[0], tokens, states)
            else:
                output = self._decode(runs, tokens, states)
            if hidden is not None:
                hidden[rows] = output.hidden
            elif logits is not None and output.logits is not None:
                logits[[order[index] for index in part if index in order]] = output.logits
        return StepOutput(hidden, logits)

    def _parts(self, runs: Sequence[Run]) -> Iterator[list[int]]:
        """Indices of the runs that are computed together."""
        singles = [index for index, run in enumerate(runs) if run.count == 1]
        yield from ([index] for index, run in enumerate(runs) if run.count > 1)
        for start in range(0, len(singles), self._lane):
            yield singles[start : start + self._lane]

    def _admit(self, step: StepInput) -> int:
        """The number of rows of the longest run.

        ggml ends the process where a bound is broken, so every bound is held here.
        """
        runs, held, slot_count, chunk, context = step.runs, self._held, self._slot_count, self._chunk, self._context
        slots, rows, longest = [], 0, 0
        for slot, position, count, _ in runs:
            if not (0 <= slot < slot_count and 1 <= count <= chunk and 0 <= position <= held[slot]):
                raise self._refusal(slot, position, count)
            if position + count > context:
                raise InvalidStep(f"position {position + count - 1} is beyond the context of {context} tokens")
            slots.append(slot)
            rows += count
            if count > longest:
                longest = count
        if not slots or len(set(slots)) != len(slots):
            raise InvalidStep("a step needs one run or more, of different slots")
        if self._is_head:
            self._check_tokens(step, rows)
        else:
            self._check_hidden(step, rows)
        return longest

    def _refusal(self, slot: int, position: int, count: int) -> InvalidStep:
        if self._closed:
            return InvalidStep("the stage is closed")
        if not 0 <= slot < self._slot_count:
            return InvalidStep(f"slot {slot} is not among the {self._slot_count} slots")
        if not 1 <= count <= self._chunk:
            return InvalidStep(f"a run of {count} tokens is not of 1 to {self._chunk}")
        return InvalidStep(f"position {position} is not within the {self._held[slot]} that slot {slot} holds")

    def _check_tokens(self, step: StepInput, rows: int) -> None:
        tokens = step.tokens
        if tokens is None or step.hidden is not None:
            raise InvalidStep("the head takes token ids")
        if tokens.shape != (rows,) or (tokens.dtype is not _I32 and tokens.dtype != _I32):
            raise InvalidStep(f"token ids are {tokens.dtype} {tokens.shape}, expected int32 ({rows},)")
        ids = tokens.tolist()
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise InvalidStep(f"token ids are not all within the vocabulary of {self.spec.vocab_size}")

    def _check_hidden(self, step: StepInput, rows: int) -> None:
        hidden = step.hidden
        if hidden is None or step.tokens is not None:
            raise InvalidStep("a stage behind the head takes hidden states")
        if hidden.shape != (rows, self._hidden_size) or (hidden.dtype is not _F32 and hidden.dtype != _F32):
            expected = f"float32 ({rows}, {self.spec.hidden_size})"
            raise InvalidStep(f"hidden states are {hidden.dtype} {hidden.shape}, expected {expected}")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.config.slots:
            raise InvalidStep(f"slot {slot} is not among the {self.config.slots} slots")
