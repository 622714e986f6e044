"""The schedule of a head: admission, chunks, lanes, cancelling."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldric.engine.schedule import (
    Close,
    Finish,
    InvalidSequence,
    Open,
    Outcome,
    QueueFull,
    ScheduleConfig,
    Scheduler,
    Sequence,
    SequenceState,
    Step,
)

CONFIG = ScheduleConfig(slots=4, context=64, chunk=8, lanes=2, decode_rows=4, queue=2)


def sequence(name: str, prompt: int, tokens: int = 4, stop: frozenset[int] = frozenset()) -> Sequence:
    return Sequence(name, np.arange(prompt, dtype=np.int32), tokens, stop)


def steps_until_idle(scheduler: Scheduler) -> list[Step]:
    """Everything that may enter the ring before a step comes back."""
    steps = []
    while (action := scheduler.next_action()) is not None:
        if isinstance(action, Step):
            steps.append(action)
    return steps


def answer(scheduler: Scheduler, step: Step, token: int = 7) -> list[Outcome]:
    return scheduler.step_done(step.number, [(run.slot, token) for run in step.runs if run.logits], 0)


def finish(scheduler: Scheduler) -> list[Step]:
    """Run until nothing is left, answering steps in the order in which they entered."""
    ring: deque[Step] = deque()
    history = []
    while True:
        entered = steps_until_idle(scheduler)
        ring.extend(entered)
        history.extend(entered)
        if not ring:
            return history
        answer(scheduler, ring.popleft())


def test_chunks_end_at_multiples_of_the_chunk_and_only_the_last_wants_logits() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(sequence("a", 20, tokens=1))
    steps = finish(scheduler)
    assert [(run.position, run.count, run.logits) for step in steps for run in step.runs] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]


@pytest.mark.parametrize(
    ("prompt", "stages", "chunk"),
    [(1000, 2, 64), (200, 2, 32), (50, 2, 16), (5, 6, 16), (1000, 6, 32), (5000, 6, 64), (50, 1, 64)],
)
def test_a_short_prompt_is_cut_into_short_chunks_so_that_several_stages_have_some(
    prompt: int, stages: int, chunk: int
) -> None:
    config = ScheduleConfig(4, 8192, 64, lanes=stages, decode_rows=4, queue=2, stages=stages, cuts_freely=True)
    scheduler = Scheduler(config)
    scheduler.submit(sequence("a", prompt, tokens=1))
    counts = [run.count for step in finish(scheduler) for run in step.runs]
    assert counts == [chunk] * (prompt // chunk) + [prompt % chunk] * (prompt % chunk > 0)


def test_chunks_are_never_longer_than_they_may_be() -> None:
    config = ScheduleConfig(4, 8192, 10, lanes=2, decode_rows=4, queue=2, stages=2, cuts_freely=True)
    assert {config.chunk_of(prompt) for prompt in range(1, 8192, 7)} == {10}


def test_chunks_of_one_prompt_enter_without_waiting_for_each_other() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(sequence("a", 60))
    assert len(steps_until_idle(scheduler)) == CONFIG.chunks_in_flight


def test_two_sequences_use_two_lanes() -> None:
    scheduler = Scheduler(CONFIG)
    for name in "ab":
        scheduler.submit(sequence(name, 3))
    for step in steps_until_idle(scheduler):
        answer(scheduler, step)
    decodes = steps_until_idle(scheduler)
    assert [len(step.runs) for step in decodes] == [1, 1]
    assert [step.lane for step in decodes] == [0, 1]


def test_four_sequences_share_two_lanes_evenly() -> None:
    scheduler = Scheduler(CONFIG)
    for name in "abcd":
        scheduler.submit(sequence(name, 3, tokens=20))
    ring = deque(steps_until_idle(scheduler))
    sizes = []
    for _ in range(20):
        answer(scheduler, ring.popleft())
        entered = steps_until_idle(scheduler)
        sizes += [len(step.runs) for step in entered]
        ring.extend(entered)
    assert sizes[-6:] == [2] * 6


def test_decode_goes_on_between_the_chunks_of_a_long_prompt() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(sequence("stream", 3, tokens=40))
    answer(scheduler, steps_until_idle(scheduler)[0])
    scheduler.submit(sequence("long", 60, tokens=1))
    ring = deque(steps_until_idle(scheduler))
    order = list(ring)
    while scheduler._prefill:
        answer(scheduler, ring.popleft())
        entered = steps_until_idle(scheduler)
        ring.extend(entered)
        order += entered
    kinds = "".join("c" if step.sequences[0].id == "long" else "d" for step in order)
    assert "cccccc" not in kinds and kinds.count("d") >= 3


def test_a_stop_token_ends_the_sequence_and_is_not_delivered() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(sequence("a", 3, stop=frozenset({7})))
    [step] = steps_until_idle(scheduler)
    [outcome] = answer(scheduler, step, 7)
    assert outcome.finish is Finish.STOP and not outcome.delivered
    assert isinstance(scheduler.next_action(), Close)


def test_the_token_limit_is_bounded_by_the_context() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(sequence("a", 60, tokens=1000))
    finish(scheduler)
    assert scheduler.running == 0
    late = sequence("b", 60, tokens=0)
    scheduler.submit(late)
    finish(scheduler)
    assert late.generated == 4


def test_prompts_that_cannot_fit_are_refused() -> None:
    scheduler = Scheduler(CONFIG)
    with pytest.raises(InvalidSequence, match="64 tokens"):
        scheduler.submit(sequence("a", 64))
    with pytest.raises(InvalidSequence, match="empty"):
        scheduler.submit(sequence("b", 0))


def test_a_full_queue_refuses_and_a_freed_slot_admits_the_oldest() -> None:
    scheduler = Scheduler(CONFIG)
    running = [sequence(name, 3) for name in "abcd"]
    waiting = [sequence(name, 3) for name in "ef"]
    for each in [*running, *waiting]:
        scheduler.submit(each)
    with pytest.raises(QueueFull):
        scheduler.submit(sequence("g", 3))
    steps_until_idle(scheduler)
    scheduler.cancel(running[2])
    assert waiting[0].slot == 2 and waiting[0].state is SequenceState.PREFILL
    actions = [scheduler.next_action(), scheduler.next_action()]
    assert isinstance(actions[0], Close) and isinstance(actions[1], Open)


def test_a_sequence_that_is_cancelled_before_it_was_opened_never_is() -> None:
    scheduler = Scheduler(ScheduleConfig(slots=1, context=64, chunk=8, lanes=2, decode_rows=4, queue=2))
    first, second, third = sequence("a", 3), sequence("b", 3), sequence("c", 3)
    for each in (first, second, third):
        scheduler.submit(each)
    assert scheduler.next_action() == Open(first)
    scheduler.cancel(first)
    scheduler.cancel(second)
    assert [scheduler.next_action(), scheduler.next_action()] == [Close(0), Open(third)]
    assert len(finish(scheduler)) == 4 and third.generated == 4


def test_a_step_of_a_cancelled_sequence_comes_back_without_effect() -> None:
    scheduler = Scheduler(CONFIG)
    cancelled = sequence("a", 3)
    scheduler.submit(cancelled)
    [step] = steps_until_idle(scheduler)
    scheduler.cancel(cancelled)
    scheduler.submit(successor := sequence("b", 3))
    assert answer(scheduler, step) == []
    assert cancelled.generated == 0 and successor.generated == 0


def test_a_broken_ring_ends_everything_and_leaves_all_slots_free() -> None:
    scheduler = Scheduler(CONFIG)
    for name in "abcdef":
        scheduler.submit(sequence(name, 30))
    steps_until_idle(scheduler)
    assert len(scheduler.cancel_all()) == 6
    assert (scheduler.running, scheduler.waiting, scheduler.in_flight) == (0, 0, 0)
    scheduler.submit(sequence("z", 30))
    assert finish(scheduler)


@given(
    requests=st.lists(st.tuples(st.integers(1, 63), st.integers(1, 30)), min_size=1, max_size=12),
    lanes=st.integers(1, 4),
    slots=st.integers(1, 6),
    chunk=st.integers(1, 20),
    cancels=st.sets(st.integers(0, 11)),
)
def test_every_sequence_ends_with_its_tokens_in_order(
    requests: list[tuple[int, int]], lanes: int, slots: int, chunk: int, cancels: set[int]
) -> None:
    config = ScheduleConfig(slots, context=64, chunk=chunk, lanes=lanes, decode_rows=3, queue=12)
    scheduler = Scheduler(config)
    sequences = [sequence(str(index), *request) for index, request in enumerate(requests)]
    for each in sequences:
        scheduler.submit(each)
    held: dict[str, int] = {}
    for number, step in enumerate(_trips(scheduler, sequences, cancels)):
        assert number < 10_000
        for run, owner in zip(step.runs, step.sequences, strict=True):
            assert held.get(owner.id, owner.reused) == run.position
            held[owner.id] = run.position + run.count
    for index, each in enumerate(sequences):
        assert each.state is SequenceState.DONE
        if index not in cancels:
            assert each.generated == min(requests[index][1], 64 - requests[index][0])
    assert scheduler.running == scheduler.waiting == scheduler.in_flight == 0


def _trips(scheduler: Scheduler, sequences: list[Sequence], cancels: set[int]) -> list[Step]:
    ring: deque[Step] = deque()
    history: list[Step] = []
    pending = sorted(index for index in cancels if index < len(sequences))
    while True:
        entered = steps_until_idle(scheduler)
        assert sum(step.runs[0].count == 1 and step.runs[0].logits for step in ring) <= 10
        ring.extend(entered)
        history.extend(entered)
        if pending:
            scheduler.cancel(sequences[pending.pop()])
        elif not ring:
            return history
        if ring:
            answer(scheduler, ring.popleft())


FREELY = ScheduleConfig(slots=2, context=64, chunk=8, lanes=2, decode_rows=4, queue=2, cuts_freely=True)


def asked(name: str, prompt: list[int], tokens: int = 4) -> Sequence:
    return Sequence(name, np.array(prompt, np.int32), tokens)


def computed(scheduler: Scheduler, wanted: Sequence) -> list[tuple[int, int]]:
    """Position and count of each run of the prompt, when it runs alone to its end."""
    scheduler.submit(wanted)
    steps = finish(scheduler)
    return [(run.position, run.count) for step in steps if step.is_chunk for run in step.runs]


def test_the_next_turn_of_a_conversation_goes_on_where_the_last_one_ended() -> None:
    scheduler = Scheduler(FREELY)
    assert computed(scheduler, asked("a", [1, 2, 3], tokens=4)) == [(0, 3)]
    turn = asked("b", [1, 2, 3, 7, 7, 7, 9, 9])  # the last token that was made was not sent into the ring
    assert computed(scheduler, turn) == [(6, 2)]
    assert turn.reused == 6


def test_a_sequence_may_ask_for_all_of_its_prompt_to_be_computed() -> None:
    scheduler = Scheduler(FREELY)
    computed(scheduler, asked("a", [1, 2, 3, 4]))
    again = asked("b", [1, 2, 3, 4])
    again.ignores_cache = True
    assert computed(scheduler, again) == [(0, 4)] and again.reused == 0


def test_the_last_token_of_a_prompt_is_computed_again_for_its_logits() -> None:
    scheduler = Scheduler(FREELY)
    computed(scheduler, asked("a", [1, 2, 3, 4], tokens=1))
    assert computed(scheduler, asked("b", [1, 2, 3, 4], tokens=1)) == [(3, 1)]


def test_where_bits_depend_on_chunks_whole_chunks_of_prompts_alone_are_taken_over() -> None:
    scheduler = Scheduler(CONFIG)
    prompt = list(range(20))
    assert computed(scheduler, asked("a", prompt)) == [(0, 8), (8, 8), (16, 4)]
    assert computed(scheduler, asked("b", [*prompt, 7, 7, 7, 7])) == [(16, 8)]
    assert computed(scheduler, asked("c", prompt[:16])) == [(8, 8)]


def test_a_conversation_is_not_given_up_for_a_few_tokens_that_another_has_in_common_with_it() -> None:
    scheduler = Scheduler(FREELY)
    computed(scheduler, asked("a", [1, 2, 3, 4, 5, 6, 8], tokens=1))
    other = asked("b", [1, 2, 9], tokens=1)
    assert computed(scheduler, other) == [(0, 3)] and other.slot == 1
    assert computed(scheduler, asked("a again", [1, 2, 3, 4, 5, 6, 8, 8], tokens=1)) == [(7, 1)]
    third = asked("c", [9, 9], tokens=1)
    assert computed(scheduler, third) == [(0, 2)] and third.slot == 1  # the longest unused


def test_a_slot_whose_sequence_failed_is_computed_anew() -> None:
    scheduler = Scheduler(FREELY)
    failing = asked("a", [1, 2, 3, 4], tokens=9)
    scheduler.submit(failing)
    [step] = steps_until_idle(scheduler)
    answer(scheduler, step)
    scheduler.fail(failing)
    finish(scheduler)
    assert computed(scheduler, asked("b", [1, 2, 3, 4])) == [(0, 4)]
    lost = asked("c", [1, 2, 3, 4, 5])
    scheduler.submit(lost)
    [step] = steps_until_idle(scheduler)
    assert scheduler.step_failed(step.number) == [lost]
    assert computed(scheduler, asked("d", [1, 2, 3, 4, 5])) == [(0, 5)]


def test_nothing_is_taken_over_that_a_ring_held_before_it_broke() -> None:
    scheduler = Scheduler(FREELY)
    computed(scheduler, asked("a", [1, 2, 3, 4]))
    scheduler.cancel_all()
    assert computed(scheduler, asked("b", [1, 2, 3, 4])) == [(0, 4)]


def test_what_a_cancelled_sequence_has_sent_is_taken_over() -> None:
    scheduler = Scheduler(FREELY)
    cancelled = asked("a", list(range(40)))
    scheduler.submit(cancelled)
    ring = steps_until_idle(scheduler)
    scheduler.cancel(cancelled)
    for step in ring:
        answer(scheduler, step)
    sent = cancelled.position
    assert 0 < sent < 40
    assert computed(scheduler, asked("b", list(range(40))))[0][0] == sent


@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 12)), min_size=1, max_size=12
    ),
    lanes=st.integers(1, 3),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 10),
    cancels=st.sets(st.integers(0, 60)),
    failures=st.sets(st.integers(0, 60)),
    cuts_freely=st.booleans(),
)
def test_a_slot_always_holds_what_its_sequence_goes_on_from(
    requests: list[tuple[list[int], int]],
    lanes: int,
    slots: int,
    chunk: int,
    cancels: set[int],
    failures: set[int],
    cuts_freely: bool,
) -> None:
    """Against a stage that keeps what each slot holds: tokens of few kinds, so that many prompts begin alike."""
    config = ScheduleConfig(slots, 64, chunk, lanes, decode_rows=3, queue=12, cuts_freely=cuts_freely)
    scheduler = Scheduler(config)
    waiting = deque(asked(str(index), *request) for index, request in enumerate(requests))
    running: list[Sequence] = []
    held: dict[int, list[int]] = {slot: [] for slot in range(slots)}
    ring: deque[Step] = deque()
    for turn in range(10_000):
        if waiting and turn % 2 == 0 and scheduler.waiting < config.queue:
            running.append(waiting.popleft())
            scheduler.submit(running[-1])
        if turn in cancels and running:
            scheduler.cancel(running[turn % len(running)])
        match scheduler.next_action():
            case Open(opened):
                assert opened.reused <= len(held[opened.slot])
                del held[opened.slot][opened.reused :]
            case Step() as step:
                ring.append(step)
                offset = 0
                for run, owner in zip(step.runs, step.sequences, strict=True):
                    expected = [*owner.prompt.tolist(), *owner.sent]
                    assert held[run.slot][: run.position] == expected[: run.position]
                    del held[run.slot][run.position :]
                    held[run.slot] += step.tokens[offset : offset + run.count].tolist()
                    offset += run.count
            case None if ring:
                step = ring.popleft()
                if turn in failures:
                    scheduler.step_failed(step.number)
                else:
                    answer(scheduler, step, token=turn % 2)
            case None if not waiting:
                break
    assert all(each.state is SequenceState.DONE for each in running)
