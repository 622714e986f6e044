"""The spine: stages in a ring give the tokens that one stage gives, and the reference's."""

import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.shapes import SHAPES, write_model
from eldric.engine.ggml.library import find_library
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from eldric.errors import InvalidRequest, NotSupported, PipelineDegraded, QueueIsFull, StaleEpoch, Unavailable
from eldric.v1 import inference_pb2, sampling_pb2
from eldric.worker.commands import Degrade, Stop
from eldric.worker.head_thread import StepFailed
from tests.llama_reference import LlamaReference
from tests.models import SmallLlama, smollm2, storyteller, write_small_llama
from tests.rings import PIPELINE, even, ring

TOKENS = 24
POISON = 270  # a token whose embedding is no number

#: The CPU variant that libllama, the reference, was built for.
REFERENCE_VARIANT = "haswell"

QUANTS = ("f16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k")


def prompt_of(length: int, vocab_size: int = 800) -> list[int]:
    return [int(token) for token in np.random.default_rng(length).integers(3, vocab_size, length)]


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
async def test_any_number_of_stages_gives_the_references_tokens(stages: int) -> None:
    lengths = (1, 5, 63, 64, 65, 255, 256, 257)
    async with ring(storyteller(), even(storyteller(), stages)) as pipeline:
        answers = [await pipeline.generate(prompt_of(length), TOKENS) for length in lengths]
    with LlamaReference(storyteller(), 512) as reference:
        for length, answer in zip(lengths, answers, strict=True):
            expected, _ = reference.greedy(prompt_of(length), TOKENS)
            assert answer == expected, f"prompt of {length} tokens"


@pytest.mark.parametrize("quant", [*QUANTS, "q2_k", "q3_k", "q5_1", "iq4_xs"])
async def test_every_weight_type_gives_the_same_tokens_for_every_split(quant: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", SHAPES["tiny"], quant)
    prompts = [prompt_of(length, 500) for length in (1, 64, 130, 250)]
    answers = []
    for layers in ([4], [2, 2], [1, 2, 1], [1, 1, 1, 1]):
        async with ring(path, layers) as pipeline:
            answers.append([await pipeline.generate(prompt, TOKENS, ignore_eos=True) for prompt in prompts])
    assert answers[1:] == answers[:1] * 3


@pytest.mark.parametrize("length", [1, 64, 130])
async def test_an_embedding_is_what_the_logits_are_made_of_for_every_split(length: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", SHAPES["tiny"], "f16")
    prompt, found = prompt_of(length, 500), []
    for layers in ([4], [2, 2], [1, 2, 1]):
        async with ring(path, layers) as pipeline:
            found.append(await pipeline.embed(prompt))
            (likeliest,) = await pipeline.generate(prompt, 1, ignore_eos=True)
    assert found[1:] == found[:1] * 2
    output = next(each for each in gguf.GGUFReader(path).tensors if each.name == "output.weight")
    logits = gguf.dequantize(output.data, output.tensor_type) @ np.array(found[0], np.float32)
    assert int(logits.argmax()) == likeliest
    assert np.linalg.norm(found[0]) == pytest.approx(1.0, abs=1e-6)


async def test_embeddings_are_the_references() -> None:
    prompts = [prompt_of(length) for length in (1, 40, 130, 257)]
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        found = [await pipeline.embed(prompt) for prompt in prompts]
    with LlamaReference(storyteller(), 512) as reference:
        expected = [reference.embedding(prompt) for prompt in prompts]
    for one, other in zip(found, expected, strict=True):
        assert np.dot(one, other / np.linalg.norm(other)) > 0.9995


async def test_embeddings_come_beside_generations_and_leave_their_slots() -> None:
    prompts = [prompt_of(length) for length in (3, 40, 70, 130, 9, 64)]
    async with ring(storyteller(), even(storyteller(), 3), slots=2) as pipeline:
        alone = [await pipeline.embed(prompt) for prompt in prompts]
        text = await pipeline.generate(prompts[0], TOKENS)
        both = [*(pipeline.embed(prompt) for prompt in prompts), pipeline.generate(prompts[0], TOKENS)]
        together = await asyncio.gather(*both)
        assert together == [*alone, text]
        assert pipeline.tables[0].find_head(PIPELINE).live == 0


async def test_a_model_that_pools_all_of_its_tokens_is_not_embedded_with(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "pools.gguf", SmallLlama(), metadata={"llama.pooling_type": 1})
    async with ring(path, [SmallLlama().layers]) as pipeline:
        with pytest.raises(NotSupported, match="pools its tokens"):
            await pipeline.embed([5, 6])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])  # by ggml's attention, and by the engine's own
@pytest.mark.parametrize("stages", [1, 3])
async def test_an_output_that_is_no_number_ends_its_sequence_and_none_beside_or_after_it(
    stages: int, kind: str, tmp_path: Path
) -> None:
    shape = SmallLlama(type=kind, layers=3)
    embeddings = shape.tensors()["token_embd.weight"]
    embeddings[POISON] = np.inf
    with np.errstate(invalid="ignore"):
        path = write_small_llama(tmp_path / "poisoned.gguf", shape, tensors={"token_embd.weight": embeddings})
    prompts = [prompt_of(length, POISON) for length in (9, 20, 33)]
    led_astray = sampling_pb2.SamplingParams(temperature=0.0, logit_bias={POISON: 100.0})
    problem = f"stage {stages - 1}: the model's output is no number"
    async with ring(path, even(path, stages)) as pipeline:
        expected = [await pipeline.generate(prompt, TOKENS) for prompt in prompts]
        for _ in range(3):
            together = [pipeline.generate(prompt, TOKENS) for prompt in prompts]
            *beside, astray = await asyncio.gather(
                *together, pipeline.generate(prompts[0], TOKENS, sampling=led_astray), return_exceptions=True
            )
            assert beside == expected
            assert isinstance(astray, StepFailed) and problem in str(astray)
        with pytest.raises(StepFailed, match=problem):
            await pipeline.embed([5, POISON])
        again = await asyncio.gather(*(pipeline.generate(prompts[0], TOKENS) for _ in range(4)))  # in every slot
        assert again == [expected[0]] * 4


@pytest.mark.model
def test_real_models_and_every_weight_type_give_the_references_tokens_over_three_stages(tmp_path: Path) -> None:
    """Token for token: both sides run the same kernels."""
    ggml = find_library().folder
    if platform.machine() != "x86_64" or not (ggml / f"libggml-cpu-{REFERENCE_VARIANT}.so").exists():
        pytest.skip("no CPU variant of this platform has the kernels that the reference has")
    with ModelFile.open(smollm2()) as model:
        tokenizer = Tokenizer.from_metadata(model.metadata)
    text = "<|im_start|>user\nList the days of the week.<|im_end|>\n<|im_start|>assistant\n"
    tiny = [prompt_of(length, 500) for length in (1, 64, 130, 250)]
    models = {quant: write_model(tmp_path / f"{quant}.gguf", SHAPES["tiny"], quant) for quant in QUANTS}
    cases = [{"path": str(path), "stages": 3, "prompts": tiny, "count": TOKENS} for path in models.values()]
    chat = {"path": str(smollm2()), "stages": 3, "prompts": [tokenizer.encode(text, special=True)], "count": 32}
    described = tmp_path / "cases.json"
    described.write_text(json.dumps([*cases, chat]))
    environment = {**os.environ, "ELDRIC_GGML_VARIANT": REFERENCE_VARIANT}
    command = [sys.executable, "-m", "tests.ring_against_llama", str(described)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    compared = dict(zip([*models, "smollm2"], json.loads(result.stdout), strict=True))
    for name, tokens in compared.items():
        assert tokens["ours"] == tokens["reference"], name
    assert [len(answer) for answer in compared["smollm2"]["ours"]] == [32]


async def test_sixteen_at_once_give_each_what_it_gives_alone() -> None:
    prompts = [prompt_of(length) for length in (3, 9, 17, 40, 64, 70, 90, 130, 5, 33, 66, 12, 100, 128, 7, 200)]
    async with ring(storyteller(), even(storyteller(), 2), slots=16) as pipeline:
        together = await asyncio.gather(*(pipeline.generate(prompt, TOKENS) for prompt in prompts))
        alone = [await pipeline.generate(prompt, TOKENS) for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("weights", ["auto", "mapped"])  # bits depend on chunks, or they do not
@pytest.mark.parametrize("stages", [1, 3])
async def test_the_next_turn_of_a_conversation_is_not_computed_from_its_beginning(stages: int, weights: str) -> None:
    first = prompt_of(150)
    async with ring(storyteller(), even(storyteller(), stages), weights=weights) as pipeline:
        said = await pipeline.generate(first, TOKENS, ignore_eos=True)
        second = [*first, *said, *prompt_of(9)]
        events = [event async for event in pipeline.events(second, TOKENS, ignore_eos=True)]
        beside = await asyncio.gather(*(pipeline.generate(second, TOKENS, ignore_eos=True) for _ in range(4)))
    async with ring(storyteller(), even(storyteller(), stages), weights=weights) as pipeline:
        expected = await pipeline.generate(second, TOKENS, ignore_eos=True)
    tokens = [token.id for event in events for token in event.delta.tokens]
    usage = events[-1].finished.usage
    assert tokens == expected and beside == [expected] * 4
    assert usage.prompt_tokens == len(second)
    whole_chunks, everything = 2 * 64, len(first) + len(said) - 1  # the last token was made and not sent
    assert usage.cached_tokens in ([whole_chunks] if weights == "mapped" else [whole_chunks, everything])


async def test_more_requests_than_slots_wait_their_turn() -> None:
    async with ring(storyteller(), even(storyteller(), 2), slots=2) as pipeline:
        answers = await asyncio.gather(*(pipeline.generate(prompt_of(8), 8) for _ in range(12)))
        assert len({tuple(answer) for answer in answers}) == 1


async def test_the_same_seed_gives_the_same_draws_for_any_split() -> None:
    sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=7, top_k=50, repetition_penalty=1.2)
    answers = []
    for stages in (1, 3):
        async with ring(storyteller(), even(storyteller(), stages)) as pipeline:
            answers.append(await pipeline.generate(prompt_of(20), TOKENS, sampling=sampling))
    assert answers[0] == answers[1]


async def test_logprobs_come_with_the_tokens() -> None:
    sampling = sampling_pb2.SamplingParams(temperature=0.0, logprobs=3)
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        events = [event async for event in pipeline.events(prompt_of(5), 2, sampling=sampling)]
    tokens = [token for event in events for token in event.delta.tokens]
    assert len(tokens) == 2
    for token in tokens:
        assert token.top[0].token == token.id and len(token.top) == 3
        assert token.logprob == pytest.approx(token.top[0].logprob)


async def test_cancelling_midway_frees_the_slot_for_the_next() -> None:
    async with ring(storyteller(), even(storyteller(), 2), slots=1) as pipeline:
        expected = await pipeline.generate(prompt_of(10), 8)
        for _ in range(5):
            events = pipeline.events(prompt_of(30), 400)
            async for event in events:
                if event.delta.tokens:
                    break
            await events.aclose()  # type: ignore[attr-defined]
        assert await pipeline.generate(prompt_of(10), 8) == expected
        for table in pipeline.tables:
            await asyncio.wait_for(table.drain(), 5)


async def test_a_lost_stage_ends_the_stream_with_an_error_that_says_so() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        events = pipeline.events(prompt_of(30), 400)
        async for event in events:
            if event.delta.tokens:
                break
        [held] = list(pipeline.tables[1])
        assert held.loaded is not None
        held.loaded.thread.post(Stop("the test ends it"))
        with pytest.raises(PipelineDegraded, match="stage 1 of 3 on worker w1 is gone: its connection closed"):
            async for _ in events:
                pass
        with pytest.raises(PipelineDegraded, match="stage 1 of 3 on worker w1 is gone"):
            await pipeline.generate(prompt_of(3), 3)


async def test_what_was_under_way_when_a_ring_broke_is_not_taken_once_it_is_mended() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        expected = await pipeline.generate(prompt_of(10), 8)
        head, body, _ = (next(iter(table)) for table in pipeline.tables)
        assert head.loaded is not None and body.loaded is not None
        steps = head.loaded.thread.steps
        body.loaded.thread.post(Degrade("a blip"))
        stranded = [asyncio.ensure_future(pipeline.generate(prompt_of(40), 8)) for _ in range(2)]
        while head.loaded.thread.steps < steps + 2:  # the head has sent both prompts into the gap
            await asyncio.sleep(0.005)
        head.loaded.thread.post(Degrade("the ring is broken"))
        for each in stranded:
            with pytest.raises(PipelineDegraded, match="the ring is broken"):
                await each
        await pipeline.connect(round=1)
        assert [held.status().round for table in pipeline.tables for held in table] == [1, 1, 1]
        assert await pipeline.generate(prompt_of(10), 8) == expected
        for table in pipeline.tables:
            await asyncio.wait_for(table.drain(), 5)


async def test_stages_of_an_earlier_round_are_refused() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        await pipeline.connect(round=2)
        with pytest.raises(StaleEpoch, match="connected in round 2, not 1"):
            await pipeline.connect(round=1)


async def test_connecting_a_ring_again_ends_what_runs_with_a_retryable_error() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        events = pipeline.events(prompt_of(30), 400)
        await anext(aiter(events))
        await pipeline.connect(round=1)
        with pytest.raises(PipelineDegraded, match="connected again"):
            async for _ in events:
                pass


async def test_a_head_that_is_shut_ends_what_waits_and_lets_go_on_what_runs() -> None:
    async with ring(storyteller(), even(storyteller(), 2), slots=1) as pipeline:
        head = pipeline.tables[0].find_head(PIPELINE)
        expected = await pipeline.generate(prompt_of(30), 100)
        running = asyncio.ensure_future(pipeline.generate(prompt_of(30), 100))
        waiting = asyncio.ensure_future(pipeline.generate(prompt_of(20), 100))
        while head.live < 2:
            await asyncio.sleep(0)
        head.shut("worker w1 is about to end")
        with pytest.raises(Unavailable, match="worker w1 is about to end"):
            await waiting
        with pytest.raises(Unavailable, match="worker w1 is about to end"):
            await pipeline.generate(prompt_of(3), 3)
        assert await running == expected
        head.shut("")
        assert len(await pipeline.generate(prompt_of(3), 3)) == 3


async def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    async with ring(storyteller(), even(storyteller(), 1), slots=1) as pipeline:
        head = pipeline.tables[0].find_head(PIPELINE)
        head._limit = 1
        events = pipeline.events(prompt_of(30), 400)
        await anext(aiter(events))
        with pytest.raises(QueueIsFull) as caught:
            await pipeline.generate(prompt_of(3), 3)
        assert caught.value.retry_after_s > 0
        await events.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 512, "512 tokens"), ([-1], "vocabulary"), ([839], "vocabulary")],
)
async def test_prompts_that_cannot_run_are_refused(prompt: list[int], message: str) -> None:
    async with ring(storyteller(), even(storyteller(), 1)) as pipeline:
        with pytest.raises(InvalidRequest, match=message):
            await pipeline.generate(prompt, 3)


async def test_usage_and_timings_are_reported() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        events = [event async for event in pipeline.events(prompt_of(5), 7)]
    finished = events[-1].finished
    assert finished.reason == inference_pb2.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 7)
    assert finished.timings.prompt_ms > 0 and finished.timings.generation_ms > 0


async def test_steps_can_be_followed_around_the_ring() -> None:
    async with ring(storyteller(), even(storyteller(), 3)) as pipeline:
        head = pipeline.tables[0].find_head(PIPELINE)
        follower = head.follow()
        first = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        await pipeline.generate(prompt_of(5), 4)
        step = await asyncio.wait_for(first, 5)
        await follower.aclose()  # type: ignore[attr-defined]
    assert [stage.stage for stage in step.stages] == [0, 1, 2]
    times = [time for stage in step.stages for time in (stage.received_ns, stage.began_ns, stage.computed_ns)]
    assert times == sorted(times) and step.returned_ns >= times[-1]


async def test_nothing_is_left_after_unloading() -> None:
    async with ring(storyteller(), even(storyteller(), 2)) as pipeline:
        await pipeline.generate(prompt_of(5), 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage-")]
